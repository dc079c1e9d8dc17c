"""Uploads to the Hugging Face hub: listed without network, refused in one line, sent in one commit."""

import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

import smalti
from command import smalti as command
from smalti.errors import ConfigError, RunError
from smalti.exporters.card import Provenance, front_matter
from smalti.exporters.hub import check_repository, plan_upload, push
from smalti.exporters.timm import export_timm
from smalti.models.licences import hub_name, licence_of


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of timm's smallest model."""
    file = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(smalti.load("random:test_vit", quiet=True).vit.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def exported(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = smalti.load(f"timm:test_vit@{weights}", quiet=True)
    out = tmp_path_factory.mktemp("out") / "folder"
    return export_timm(
        encoder, out, Provenance(("**Weights**: own",), "dinov3-license", "timm/x.y", "neco", "me/x")
    ).path


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("unreachable")
def test_a_dry_run_lists_files_sizes_and_front_matter_without_network(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command("export", f"timm:test_vit@{weights}", "--out", tmp_path / "out", "--push", "me/tiny", "--dry-run")
    lines = done.stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("would upload to me/tiny"))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert f"  model.safetensors  {size:,} bytes" in lines[start:]
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert "  library_name: timm" in lines and any(line.startswith("  license: ") for line in lines)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "hf-hub:me/tiny" in card and str(tmp_path) not in card


def test_the_card_starts_with_what_the_hub_reads(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    data = huggingface_hub.ModelCard.load(exported / "README.md").data.to_dict()
    assert card.startswith("---\n") and data == yaml.safe_load(card.split("---\n")[1])
    assert data == {
        "license": "other",
        "license_name": "dinov3-license",
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["smalti", "vision-transformer", "self-supervised-learning", "neco"],
        "base_model": "timm/x.y",
    }
    plan = plan_upload(exported, "me/x")
    assert plan.front_matter == data and [name for name, _ in plan.files] == sorted(p.name for p in exported.iterdir())
    assert licence_of(f"hf:{exported}") == "dinov3-license"  # read back from the card


def test_front_matter_of_other_libraries_and_licences() -> None:
    front = front_matter("hf", Provenance(licence="Apache-2.0"))
    assert (front["license"], front["library_name"]) == ("apache-2.0", "transformers")
    assert "license" not in front_matter("onnx", Provenance()) and "base_model" not in front


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("timm:vit_small_patch14_dinov2.lvd142m", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("timm:vit_small_patch14_dinov2", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("timm:vit_small_patch14_dinov2@file.pth", None),
        ("hf:facebook/dinov2-small", "facebook/dinov2-small"),
        ("hf:./folder/x", None),
        ("random:vit_small_patch14_dinov2", None),
        ("runs/a", None),
    ],
)
def test_weights_of_the_hub_have_a_name(spec: str, name: str | None) -> None:
    assert hub_name(spec) == name


@pytest.mark.parametrize("name", ["", "model", "a/b/c", "me/", "me/a..b", "me/a b", "https://hub/me/a"])
def test_a_wrong_repository_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a repository on the hub") as error:
        check_repository(name)
    assert "\n" not in str(error.value)


def test_wrong_options_write_nothing(weights: Path, tmp_path: Path) -> None:
    for options, line in (
        (["--dry-run"], "--dry-run lists what --push OWNER/NAME would upload; give both"),
        (["--push", "model"], "--push model: is no name of a repository"),
    ):
        done = command("export", f"timm:test_vit@{weights}", "--out", tmp_path / "out", *options, code=2)
        assert line in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_is_one_line_and_the_folder_stays(exported: Path) -> None:
    with pytest.raises(RunError, match=r"--push me/x: could not be uploaded \(.*later with: hf upload me/x") as error:
        push(exported, "me/x")
    assert "\n" not in str(error.value) and (exported / "model.safetensors").exists()


def test_an_upload_creates_a_private_repository_and_sends_the_folder(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict]] = []

    class Api:
        def create_repo(self, name: str, **more: object) -> str:
            calls.append((name, more))
            return f"https://hub/{name}"

        def upload_folder(self, **more: object) -> None:
            calls.append(("upload", more))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(exported, "me/x") == "https://hub/me/x"
    assert calls[0] == ("me/x", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == exported and calls[1][1]["repo_id"] == "me/x"
