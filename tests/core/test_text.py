import json

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core import config as configuration
from msmdiff.core.condition import Classes, Text, drop
from msmdiff.core.data import loader, sources
from msmdiff.core.data.encode import encode
from msmdiff.core.data.text import Captions, TextEncoder, features, read_captions
from msmdiff.core.diffusion.codecs.pixel import PixelCodec
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.training.run import Run
from msmdiff.core.training.trainer import Trainer, train

T2I = {
    "model": {
        "name": "U-ViT-S/2-T2I",
        "hidden_size": 16,
        "num_heads": 2,
        "depth": 3,
        "context_tokens": 7,
        "context_width": 16,
    },
    "train": {"batch_size": 4, "steps": 2, "log_every": 1},
    "data": {"image_size": 16},
    "objective": {"label_dropout": 0.5},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP text encoder: letters for a vocabulary, 7 tokens, 16 wide."""
    transformers = pytest.importorskip("transformers")
    vocabulary = {
        f"{c}{end}": 2 * i + j
        for i, c in enumerate(map(chr, range(97, 123)))
        for j, end in enumerate(("", "</w>"))
    }
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    folder = tmp_path_factory.mktemp("clip") / "clip"
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def captioned(photos):
    """The photos with two captions each, in text files beside them."""
    for path in photos.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a {path.parent.name}\nno {path.stem}\n\n")
    return photos


def pack(photos, clip, out):
    source = sources.open_source(str(photos))
    data = configuration.build(T2I).data
    captions = Captions.read(source, "txt", TextEncoder(str(clip)))
    encode(source, PixelCodec(16), data, out, lambda *_: None, captions=captions, shard=5)
    return sources.open_source(str(out))


def test_features_are_clips_last_hidden_states(clip):
    transformers = pytest.importorskip("transformers")
    encoder = TextEncoder(str(clip))
    network = transformers.CLIPTextModel.from_pretrained(clip)
    # "a cat" and nothing, padded.
    ids = torch.tensor([[52, 1, 4, 0, 39, 53, 53], [52, 53, 53, 53, 53, 53, 53]])
    with torch.no_grad():
        expected = network(ids).last_hidden_state
    torch.testing.assert_close(encoder(["a cat", ""]), expected)
    assert encoder.about["shape"] == [7, 16]
    assert encoder(["a cat that is far too long for it"]).shape == (1, 7, 16)


def test_a_folder_that_is_no_text_encoder_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(MsmdiffError, match="cannot be loaded as a CLIP text encoder"):
        TextEncoder(str(tmp_path))


def test_captions_come_from_text_files_or_json(captioned, tmp_path):
    source = sources.open_source(str(captioned))
    texts = read_captions(source, "txt")
    assert texts[0] == ["a cat", "no 1"]
    names = [source.name(i) for i in range(12)]
    coco = {
        "images": [{"id": 7 * i, "file_name": name.split("/")[1]} for i, name in enumerate(names)],
        "annotations": [{"image_id": 7 * i, "caption": t} for i in range(12) for t in texts[i]],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "plain.json").write_text(json.dumps(dict(zip(names, texts, strict=True))))
    assert read_captions(source, str(tmp_path / "coco.json")) == texts
    assert read_captions(source, str(tmp_path / "plain.json")) == texts
    (captioned / "dog" / "0.txt").write_text(" \n")
    (captioned / "dog" / "2.txt").unlink()
    with pytest.raises(
        UsageError, match=r"2 of 12 images in .* have no caption, such as dog/0.png"
    ):
        read_captions(source, "txt")
    with pytest.raises(UsageError, match=r"missing.json cannot be read: No such file"):
        read_captions(source, str(tmp_path / "missing.json"))


def test_a_packed_set_keeps_all_captions_and_draws_one_per_visit(captioned, clip, tmp_path):
    packed = pack(captioned, clip, tmp_path / "p")
    encoder = TextEncoder(str(clip))
    expected = encoder(["a cat", "no 1"])
    draws = [packed.context(np.array([0]), np.random.default_rng(i))[0] for i in range(20)]
    nearest = [int((expected - draw).flatten(1).norm(dim=1).argmin()) for draw in draws]
    assert set(nearest) == {0, 1}
    torch.testing.assert_close(draws[0], expected[nearest[0]], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(packed.null_context, encoder([""])[0], rtol=2e-3, atol=2e-3)


def test_dropped_rows_become_the_null():
    dropped = torch.tensor([True, False, True])
    assert drop(Classes(9), torch.tensor([3, 4, 5]), dropped).tolist() == [9, 4, 9]
    y, null = torch.randn(3, 7, 16), torch.randn(7, 16)
    out = drop(Text(7, 16, null), y, dropped)
    assert torch.equal(out[0], null)
    assert torch.equal(out[1], y[1])


def test_training_feeds_captions_and_the_empty_one(captioned, clip, tmp_path, quiet):
    packed = pack(captioned, clip, tmp_path / "p")
    config = configuration.build(T2I, {"data": {"source": packed.spec}})
    trainer = Trainer(config, tmp_path / "r", quiet, False, "")
    seen = []
    terms = trainer.parts.objective.terms
    trainer.parts.objective.terms = lambda *given: seen.append(given[4]) or terms(*given)
    trainer.fit()
    trainer.close()
    rows = torch.cat(seen)
    empty = (rows == packed.null_context).flatten(1).all(1)
    assert rows.shape == (8, 7, 16)
    assert 0 < empty.sum() < 8
    assert (
        len(list((tmp_path / "r" / "previews").glob("*.png"))) == 1
    )  # none of the untrained network
    stored = trainer.run.stored_config()
    assert stored.codec.text == str(clip)  # to sample with
    assert features(stored, ["a dog"])[0].shape == (1, 7, 16)


def test_the_held_out_loss_tells_captions(captioned, clip, tmp_path, quiet):
    packed = pack(captioned, clip, tmp_path / "p")
    held = pack(captioned, clip, tmp_path / "held")
    layer = {"data": {"source": packed.spec}, "eval": {"heldout": held.spec, "heldout_n": 5}}
    train(configuration.build(T2I, layer), tmp_path / "r", quiet)
    line = Run(tmp_path / "r", writes=False).metrics()[-1]
    assert line["val_of"] == f"{held.spec}, 5 images"
    assert line["val_loss"] == pytest.approx(1, abs=0.2)  # a network that starts with zeros


def test_what_does_not_draw_from_text_says_so(photos, captioned, clip, tmp_path, quiet):
    with pytest.raises(
        UsageError, match=r"draws from captions \(7 tokens of width 16\), .* has none"
    ):
        train(configuration.build(T2I, {"data": {"source": str(photos)}}), tmp_path / "r", quiet)
    packed = pack(captioned, clip, tmp_path / "p")
    wide = configuration.build(
        T2I, {"data": {"source": packed.spec}, "model": {"context_width": 8}}
    )
    with pytest.raises(UsageError, match=r"context_width is \(7, 8\), not \(7, 16\)"):
        train(wide, tmp_path / "r", quiet)
    classes = {
        "model": {"name": "tiny", "num_classes": 2},
        "data": {"source": packed.spec, "image_size": 16},
    }
    # Its labels, not its captions.
    train(configuration.build(classes, {"train": T2I["train"]}), tmp_path / "c", quiet)


def coco_cache(root, n=4):
    """U-ViT's cache of MS-COCO: moments and up to two captions each."""
    (root / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(root / "empty_context.npy", rng.standard_normal((7, 16), np.float32))
    for i in range(n):
        np.save(root / "train" / f"{i}.npy", rng.standard_normal((8, 2, 2), np.float32))
        for k in range(1 + i % 2):
            np.save(root / "train" / f"{i}_{k}.npy", rng.standard_normal((7, 16), np.float32))
    return root / "train"


def test_u_vits_coco_cache_trains_and_packs(tmp_path, quiet):
    cache = sources.open_source(str(coco_cache(tmp_path / "coco")))
    assert len(cache) == 4
    config = configuration.build(
        T2I, {"data": {"source": cache.spec, "workers": 0}, "codec": {"name": "vae"}}
    )
    config = configuration.build(
        config.as_dict(), {"model": {"patch_size": 1}, "train": {"preview_every": 0}}
    )
    train(config, tmp_path / "r", quiet)
    encode(cache, PixelCodec(16), config.data, tmp_path / "p", lambda *_: None, shard=3)
    packed = sources.open_source(str(tmp_path / "p"))
    stored = {cache.caption(3, k).half().float().numpy().tobytes() for k in (0, 1)}
    drawn = {
        packed.context(np.array([3]), np.random.default_rng(i))[0].numpy().tobytes()
        for i in range(9)
    }
    assert drawn == stored
    assert torch.equal(packed.null_context, cache.null_context.half().float())
    dataset = loader.TrainingImages(cache, config.data, 0)
    assert dataset.context(2) is None  # nobody asked for captions yet
    (tmp_path / "coco" / "empty_context.npy").unlink()
    with pytest.raises(UsageError, match=r"has captions but no empty_context.npy"):
        sources.open_source(cache.spec)


def test_sample_from_prompts(cli, captioned, clip, tmp_path, quiet):
    packed = pack(captioned, clip, tmp_path / "p")
    preview = {"train": {"preview_every": 0}}
    train(
        configuration.build(T2I, preview, {"data": {"source": packed.spec}}),
        tmp_path / "runs" / "t",
        quiet,
    )
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    options = ("sample", "t", "--steps", "2", "--cfg", "2")
    cli(*options, "--prompts", "prompts.txt", "--out", "s")
    pictures = [np.asarray(Image.open(tmp_path / "s" / f"{i:06d}.png")) for i in (0, 1)]
    assert pictures[0].shape == (16, 16, 3)
    assert not (tmp_path / "s" / "000002.png").exists()  # an image a prompt
    assert "give --prompts FILE" in cli(*options, "--n", "2", code=2).stderr
