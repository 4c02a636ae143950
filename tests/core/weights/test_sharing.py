"""Weights to and from the hub: a folder laid out like a repository, and a hub that a server here
plays.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from PIL import Image

import msmdiff
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import files, hub, weights
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.weights import sharing


def a_run(folder: Path, **layers) -> Path:
    """A run's weights, and what lies beside them."""
    torch.manual_seed(0)
    model = {"num_classes": 2, "hidden_size": 16, "num_heads": 2, "depth": 3}
    config = road.resolve(configuration.build({"model": model}, layers))
    network = road.build(config).backbone
    folder.mkdir(parents=True)
    path = folder / "weights.safetensors"
    about = {"class_names": json.dumps(["red | blue", "green"]), "images_seen": 1234}
    weights.save(path, network.state_dict(), config, weights="ema-0.999", **about)
    (folder / "previews").mkdir()
    for images in (9, 10):
        picture = folder / "previews" / f"{images}-images-samples.png"
        Image.new("RGB", (images, 1)).save(picture)
    best = {"metric": "FID", "value": 7.25, "images": 640, "checkpoint": None}
    (folder / "best.json").write_text(json.dumps(best))
    return path


def test_what_is_pushed_to_a_folder_comes_back_as_it_was_and_opens(tmp_path, monkeypatch):
    path = a_run(tmp_path / "runs" / "tuned")
    sharing.push(path, f"{tmp_path}/shared/", sharing.Terms(license="cc-by-4.0"))
    monkeypatch.chdir(tmp_path)
    pulled = sharing.pull("./shared", Path("mine"))
    assert files.checksum(pulled) == files.checksum(path)
    drawn = [
        msmdiff.load(place, layers=[{"sample": {"steps": 2}}]).draw(2, classes="green")
        for place in ("mine", "runs/tuned")
    ]
    assert torch.equal(drawn[0], drawn[1])
    # The newest preview, by images seen and not by letters.
    assert Image.open("mine/samples.png").width == 10


def test_the_card_says_what_the_weights_are_and_how_to_use_them(tmp_path):
    path = a_run(tmp_path / "runs" / "tuned")
    folder = tmp_path / "shared"
    sharing.push(path, f"{folder}/", sharing.Terms(license="cc-by-4.0"))
    text = (folder / "README.md").read_text()
    head = text.split("---")[1]
    assert "license: cc-by-4.0" in head
    assert "library_name: msmdiff" in head
    numbers = sum(v.numel() for v in weights.read(path).tensors.values())
    assert f"{numbers:,} parameters" in text
    assert "| images seen | 1,234 |" in text
    assert "2: red \\| blue, green" in text
    assert files.checksum(path) in text
    assert "FID 7.2500, after 640 images" in text
    assert "msmdiff sample shared --n 16 --classes 'red | blue'" in text


def test_a_primer_is_not_offered_to_be_sampled(tmp_path):
    path = a_run(tmp_path / "p", objective={"name": "msm"}, mask={"ratio": 0.5})
    sharing.push(path, f"{tmp_path}/shared/", sharing.Terms())
    text = (tmp_path / "shared" / "README.md").read_text()
    assert "msmdiff sample" not in text
    assert "50% of the tokens hidden" in text
    assert not (tmp_path / "shared" / "samples.png").exists()


def test_what_others_wrote_stays(tmp_path):
    path = a_run(tmp_path / "tuned")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "README.md").write_text("my own words")
    with pytest.raises(UsageError, match=r"README.md is there already"):
        sharing.push(path, f"{folder}/", sharing.Terms())
    assert [each.name for each in folder.iterdir()] == ["README.md"]
    (tmp_path / "tuned" / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="is a run"):
        sharing.pull(f"{folder}/", tmp_path / "tuned")


def test_what_the_file_tells_of_this_machine_is_named(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    guide = tmp_path / "guides" / "weak.safetensors"
    guide.parent.mkdir()
    guide.touch()
    Path("uvit").mkdir()  # a folder called like a choice
    path = a_run(
        tmp_path / "r",
        data={"source": "/photos/mine"},
        objective={
            "alignment": "repa",
            "encoder": "test_vit",
            "encoder_weights": "/home/me/vit.safetensors",
        },
        codec={"name": "vae", "vae": "~/vae", "channels": 4},
        eval={"weights": "/nets/inception.pth", "reference": "digits:test"},
        sample={"guide": "guides/weak.safetensors", "cfg_scale": 2.0},
    )
    told = {
        "data.source": "/photos/mine",
        "objective.encoder_weights": "/home/me/vit.safetensors",
        "codec.vae": "~/vae",
        "eval.weights": "/nets/inception.pth",
        "sample.guide": "guides/weak.safetensors",
    }
    assert dict(sharing.local_paths(path)) == told
    done = cli("weights", "push", str(path), f"{tmp_path}/shared/")
    said = [line for line in done.stdout.splitlines() if "tells others" in line]
    assert len(said) == len(told)
    assert all(f"your {key}: {value}" in done.stdout for key, value in told.items())
    config = weights.stored_config(path).model_copy(update={"plugins": ["mine"]})
    monkeypatch.setattr(sharing, "stored_config", lambda path: config)
    assert sharing.local_paths(path)[-1] == ("plugins", "mine")


def test_damaged_weights_are_not_put_in_place(tmp_path):
    path = a_run(tmp_path / "tuned")
    sharing.push(path, f"{tmp_path}/shared/", sharing.Terms())
    torn = tmp_path / "shared" / "weights.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    with pytest.raises(MsmdiffError, match=r"weights\.safetensors"):
        sharing.pull(f"{tmp_path}/shared", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("place", "is_folder"),
    [("me/name", False), ("./me/name", True), ("/me/name", True), ("me/name/", True)],
)
def test_a_place_is_a_repository_unless_it_is_written_as_a_folder(place, is_folder):
    assert sharing.is_folder(place) is is_folder


@pytest.fixture
def answers(monkeypatch):
    """A hub that answers every request with the same code and error."""
    told = {"code": 404, "error": "RepoNotFound"}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(told["code"])
            self.send_header("X-Error-Code", told["error"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_HEAD

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield told
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (404, "RepoNotFound", "me/it: the hub knows no such repository"),
        (404, "RevisionNotFound", "me/it has no such revision"),
        (404, "EntryNotFound", r"me/it holds no weights\.safetensors"),
        (403, "GatedRepo", "me/it is gated"),
        (403, "", "me/it: the hub does not allow it"),
        (410, "", "me/it: the hub answered 410"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(answers, tmp_path, code, error, words):
    answers.update(code=code, error=error)
    with pytest.raises(MsmdiffError, match=words):
        sharing.pull("me/it", tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_without_a_token_nothing_is_sent(tmp_path, monkeypatch):
    path = a_run(tmp_path / "tuned")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="no token for the hub: run hf auth login"):
        sharing.push(path, "me/it", sharing.Terms())


@pytest.mark.parametrize(
    ("mask", "pictured"), [({"route": "tread", "enter": 1, "leave": 0}, True), ({}, False)]
)
def test_a_network_that_gives_whole_images_is_no_primer(tmp_path, mask, pictured):
    layers = {"objective": {"name": "msm"}, "mask": {"ratio": 0.5, **mask}}
    path = a_run(tmp_path / "runs" / "masked", **layers)
    sharing.push(path, f"{tmp_path}/shared/", sharing.Terms())
    card = (tmp_path / "shared" / "README.md").read_text()
    assert ("fine-tune it before you draw" not in card) is pictured
    assert ("msmdiff sample shared" in card) is pictured
    assert (tmp_path / "shared" / "samples.png").exists() is pictured


def test_a_push_to_the_hub_is_one_commit_of_the_three_files(answers, tmp_path, monkeypatch):
    path = a_run(tmp_path / "tuned")
    sent = {}

    def create_repo(self, repo_id, private=None, exist_ok=False):
        sent["created"] = (repo_id, private, exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id, folder_path, **more):
        sent[repo_id] = sorted(file.name for file in Path(folder_path).iterdir())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert sharing.push(path, "me/it", sharing.Terms(private=True)) == "https://hub/me/it"
    assert sent["created"] == ("me/it", True, True)
    assert sent["me/it"] == ["README.md", "samples.png", "weights.safetensors"]


def test_offline_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.OutOfReach, match="HF_HUB_OFFLINE is set"):
        sharing.pull("me/it", tmp_path / "it")
