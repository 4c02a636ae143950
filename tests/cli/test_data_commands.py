import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from msmdiff.core.data import inspection, sources


def test_encode_inspect_train_sample_on_latents(cli, photos, vae, tmp_path):
    encode = (
        "data",
        "encode",
        "photos",
        "-o",
        "latents",
        "--vae",
        str(vae),
        "--image-size",
        "32",
        "--mirror",
    )
    done = cli(*encode, "--shard", "5")
    assert "latents: 12 images encoded now, of 12" in done.stdout
    assert "images/s" in done.stdout
    report = json.loads(
        cli("data", "inspect", "latents", "--speed", "--json", "--sheet", "sheet.png").stdout
    )
    assert report["images"] == 12
    assert report["classes"] == {"cat": 6, "dog": 6}
    assert report["entry"] == [2, 8, 4, 4]
    assert report["entries_per_s"] > 0
    assert len(report["latent_std"]) == 4
    assert Image.open(tmp_path / "sheet.png").size[0] > 32 * 3
    train = (
        "train",
        "--data",
        "latents",
        "--codec",
        "vae",
        "--image-size",
        "32",
        "--conditional",
        "--model",
        "tiny",
    )
    cli(*train, "--steps", "2", "--batch-size", "4", "--run", "r", "--set", "data.hflip=0.5")
    cli("sample", "r", "--n", "2", "--steps", "2", "--out", "s")
    assert Image.open(tmp_path / "s" / "000001-dog.png").size == (32, 32)


def test_inspect_names_what_cannot_be_read(cli, photos):
    (photos / "cat" / "broken (1).png").write_bytes(b"torn")
    done = cli("data", "inspect", "photos", code=1)
    assert "40x24: 12" in done.stdout
    assert "cat/broken (1).png (4 bytes that begin as no PNG, JPEG" in done.stdout


def test_pack_keeps_files_or_crops_them(cli, photos, tmp_path):
    first = sources.open_source(str(photos)).names[0]
    (photos / first).with_suffix(".txt").write_text("a cat")
    cli("data", "pack", "photos", "-o", "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert len(archive.namelist()) == 13  # one caption
        assert archive.read("cat/1.png") == (photos / "cat" / "1.png").read_bytes()
    assert "is there already" in cli("data", "pack", "photos", "-o", "p.zip", code=2).stderr
    (tmp_path / "p.zip").write_bytes(b"mine")
    cli("data", "pack", "photos", "-o", "p.zip", "--overwrite")
    assert zipfile.is_zipfile(tmp_path / "p.zip")
    for spec, size in ((str(photos), 8), ("digits", None)):
        packed = tmp_path / f"{size}.zip"
        inspection.pack(sources.open_source(spec), packed, size, lambda *_: None)
        report = inspection.report(sources.open_source(str(packed)))
        with zipfile.ZipFile(packed) as archive:
            captions = [name for name in archive.namelist() if name.endswith(".txt")]
            assert captions == (
                [str(Path(first).with_suffix(".txt"))] if spec == str(photos) else []
            )
            assert not [name for name in archive.namelist() if name.count(".") > 1]
        assert report["sizes"] == {"8x8": report["images"]}
        assert report["classes"] == inspection.report(sources.open_source(spec))["classes"]


def test_two_processes_share_the_shards(cli, photos, tmp_path):
    """Started as torchrun starts them; the second waits for the first to make the files."""
    encode = (
        "data",
        "encode",
        "photos",
        "-o",
        "p",
        "--codec",
        "pixel",
        "--image-size",
        "16",
        "--shard",
        "5",
    )
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda rank: cli(*encode, RANK=rank, WORLD_SIZE="2"), ("1", "0")))
    assert "[1] p: 5 images encoded now, of 12" in done[0].stdout
    assert "[0] p: 7 images encoded now, of 12" in done[1].stdout
    assert len(sources.open_source(str(tmp_path / "p"))) == 12
