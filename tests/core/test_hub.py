"""What comes from the internet: an unreachable server is noticed at once, a cache is enough."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from msmdiff.core import hub


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def closed(monkeypatch):
    """A hub whose port nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield


class Missing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_any_answer_is_enough():
    server = HTTPServer(("127.0.0.1", 0), Missing)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    hub.require(f"http://127.0.0.1:{server.server_port}/a")
    thread.join()
    server.server_close()


def test_silence_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(OSError, match=f"{place} cannot be reached: (no answer|timed out)"):
            hub.require(f"http://{place}/a")


def test_out_of_reach_the_option_is_named(closed):
    offline = []

    def load():
        with hub.loading("a/b", "codec.vae", "give a file"):
            offline.append(constants.is_offline_mode())
            raise OSError("theirs")

    with pytest.raises(hub.OutOfReach, match=r"codec.vae a/b is no folder.*refused.*: give a file"):
        load()
    assert offline == [True]  # so that the libraries look into the cache alone
    assert not constants.is_offline_mode()


def test_what_lies_here_needs_no_hub(closed, tmp_path):
    with hub.loading(str(tmp_path), "codec.vae", "give a file"):
        assert not constants.is_offline_mode()


def test_a_vae_out_of_reach_is_one_sentence(closed):
    pytest.importorskip("diffusers")
    from msmdiff.core.diffusion.codecs.vae import VaeCodec

    with pytest.raises(hub.OutOfReach, match=r"codec.vae nobody/nothing is no folder or file here"):
        VaeCodec(32, vae="nobody/nothing").load()


def test_a_text_encoder_out_of_reach_is_one_sentence(closed):
    pytest.importorskip("transformers")
    from msmdiff.core.data.text import TextEncoder

    with pytest.raises(hub.OutOfReach, match=r"text encoder nobody/nothing is no folder.*--text"):
        TextEncoder("nobody/nothing")


def test_dinov2_out_of_reach_is_one_sentence(closed, monkeypatch):
    from msmdiff.core.metrics.dinov2 import DinoFeatures

    def download(*_, **__):
        raise RuntimeError("theirs")

    monkeypatch.setattr("timm.create_model", download)
    with pytest.raises(hub.OutOfReach, match=r"DINOv2's weights .*: give dinov2_vitl14_pretrain"):
        DinoFeatures()
