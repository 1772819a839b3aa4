"""Which files belong to an adapter folder, and which of a repository's files a reference means."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lorahub.errors import IntegrityError, NotFound, PushRefused, UnsafePath, UsageError
from lorahub.hub.contents import MOST_FILES, is_behaviour, rule_for, survey
from lorahub.hub.hub import FilePin
from lorahub.hub.selection import select_adapter, select_base

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TOKEN = "hf_" + "a1B2c3D4" * 5


def make(folder: Path, *names: str, content: bytes = b"x") -> Path:
    for name in names:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return folder


def codes(folder: Path) -> dict[str, tuple[str, ...]]:
    return {finding.code: finding.where for finding in survey(folder).refused}


ROLES = {
    "behaviour": [
        "adapter_model.gguf",
        "Llama-3-LoRA-F16.gguf",
        "adapters.npz",
        "adapter_config.json",
        "lorahub.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "adapters.safetensors",
        "my style v2.safetensors",
        "text_encoder/adapter_model.safetensors",
    ],
    "companion": [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
    ],
    "document": ["README.md", "LICENSE", "LICENSE.txt", "NOTICE"],
    "picture": ["preview.png", "images/One.JPG", "logo.svg"],
    "leftover": [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
        "checkpoint-500/adapter_model.safetensors",
        "runs/Nov22/events.out.tfevents.1.host.2.0",
        "wandb/latest-run/x",
        "global_step10/x.pt",
        ".git/config",
        "__pycache__/x.pyc",
        ".gitattributes",
    ],
    "secret": [".env", ".env.local", "id_rsa", "server.pem", "token", ".netrc", "secrets.json"],
    "pickle": ["adapter_model.bin", "lora.pt", "x.ckpt", "weights.pkl"],
    "base": [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
    ],
    "unknown": ["train.py", "data.csv", "config.yaml", "notes.txt", "weights.gguf", "adapter_config.json.bak"],
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLES.items() for name in names])
def test_every_file_has_the_role_of_the_first_row_it_matches(role, name):
    assert rule_for(name).role == role


def test_an_adapter_as_its_trainer_left_it_is_published_without_the_leftovers(tmp_path):
    make(tmp_path, *ADAPTER, "README.md", "tokenizer.json", "optimizer.pt", "checkpoint-5/adapter_model.safetensors")
    make(tmp_path, "runs/a/b", ".lorahub-0123456789abcdef.partial")
    found = survey(tmp_path)
    found.demand()
    assert list(found.files) == ["README.md", *ADAPTER, "tokenizer.json"]
    assert found.skipped == (".lorahub-0123456789abcdef.partial", "checkpoint-5/", "optimizer.pt", "runs/")


def test_everything_that_must_not_be_published_is_listed_at_once(tmp_path):
    make(tmp_path, *ADAPTER, ".env", "adapter_model.bin", "train.py", "model.safetensors", "sub/bad?.png", "aux.png")
    make(tmp_path, "notes/README.md", content=f"log in with {TOKEN}".encode())
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "adapter_model.safetensors")
    (tmp_path / "folder").symlink_to(tmp_path / "notes", target_is_directory=True)
    found = survey(tmp_path)
    assert codes(tmp_path) == {
        "secret-file": (".env",),
        "secret-text": ("notes/README.md",),
        "link": ("folder", "link.safetensors"),
        "pickle-weights": ("adapter_model.bin",),
        "base-weights": ("model.safetensors",),
        "unknown-file": ("train.py",),
        "bad-name": ("aux.png", "sub/bad?.png"),
    }
    with pytest.raises(PushRefused) as caught:
        found.demand()
    assert caught.value.findings == found.refused
    for finding in found.refused:
        assert finding.remedy
        assert all(place in caught.value.message for place in (finding.code, *finding.where))
    assert TOKEN not in str(caught.value)


def test_a_link_out_of_a_leftover_folder_is_not_followed_and_not_minded(tmp_path):
    make(tmp_path / "adapter", *ADAPTER, "wandb/run-1/x")
    (tmp_path / "adapter" / "wandb" / "latest-run").symlink_to(tmp_path / "adapter" / "wandb" / "run-1")
    survey(tmp_path / "adapter").demand()


def test_a_leftover_that_is_a_link_is_refused_all_the_same(tmp_path):
    make(tmp_path / "adapter", *ADAPTER)
    (tmp_path / "adapter" / "checkpoint-1").symlink_to(tmp_path)
    assert codes(tmp_path / "adapter") == {"link": ("checkpoint-1",)}


@pytest.mark.parametrize(
    "text",
    [TOKEN, "ghp_" + "a" * 36, "-----BEGIN OPENSSH PRIVATE KEY-----", "AKIA" + "A" * 16],
    ids=["hub", "github", "key", "cloud"],
)
@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "preview.svg", "adapter_model.safetensors"])
def test_a_secret_is_found_wherever_it_hides(tmp_path, name, text):
    make(tmp_path, *ADAPTER)
    make(tmp_path, name, content=b"\0" * 1000 + text.encode() + b"\0")
    assert codes(tmp_path) == {"secret-text": (name,)}


def test_a_word_that_only_begins_like_a_token_is_no_secret(tmp_path):
    make(tmp_path, *ADAPTER)
    make(tmp_path, "README.md", content=b"hf_hub_download and hf_transfer")
    assert not codes(tmp_path)


def test_names_that_differ_only_in_case_are_refused(tmp_path):
    make(tmp_path, *ADAPTER, "images/a.png", "images/A.png", "Images/b.png")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system takes both names for one")
    assert codes(tmp_path) == {"case-collision": ("Images/, images/", "images/A.png, images/a.png")}


def test_a_folder_without_weights_is_refused(tmp_path):
    make(tmp_path, "adapter_config.json")
    assert codes(tmp_path) == {"no-weights": (str(tmp_path),)}


def test_a_file_larger_than_its_kind_may_be_is_refused(tmp_path):
    make(tmp_path, *ADAPTER)
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(5 << 20)
    assert codes(tmp_path) == {"too-large": ("README.md",)}


def test_a_socket_is_refused_without_being_opened(tmp_path, monkeypatch):
    make(tmp_path, *ADAPTER)
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("x.png")
        assert codes(tmp_path) == {"not-a-file": ("x.png",)}


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    make(tmp_path, *ADAPTER, "README.md")
    (tmp_path / "README.md").chmod(0)
    if os.access(tmp_path / "README.md", os.R_OK):
        pytest.skip("runs as root, whom permissions do not bind")
    assert codes(tmp_path) == {"unreadable": ("README.md",)}


def test_a_folder_of_a_data_set_is_refused_without_reading_on(tmp_path):
    make(tmp_path, *ADAPTER, *(f"images/{number}.png" for number in range(MOST_FILES + 1)))
    assert "too-many-files" in codes(tmp_path)


def test_control_characters_in_a_name_are_shown_escaped(tmp_path):
    make(tmp_path, *ADAPTER, "a\x1b]0;x\x07.png")
    assert codes(tmp_path) == {"bad-name": ("a\\x1b]0;x\\x07.png",)}


def test_a_folder_that_is_none_is_said_to_be_none(tmp_path):
    make(tmp_path, "x.safetensors")
    with pytest.raises(NotFound):
        survey(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        survey(tmp_path / "x.safetensors")


# -------------------------------------------------------------------------------- what a reference means


def listing(*names: str, size: int = 10) -> dict[str, FilePin]:
    return {name: FilePin(size=size, sha256="0" * 64) for name in names}


def chosen(names: dict[str, FilePin], subpath: str = "") -> list[str]:
    return sorted(select_adapter(names, subpath, repo="acme/ink").files)


def test_the_whole_repository_is_the_adapter_without_what_no_adapter_holds():
    names = listing(
        *ADAPTER, "README.md", "optimizer.pt", "adapter_model.bin", "train.py", "checkpoint-1/x.safetensors"
    )
    assert chosen(names) == ["README.md", *ADAPTER]


def test_a_folder_is_an_adapter_of_its_own():
    names = listing(*ADAPTER, *(f"sql/{name}" for name in ADAPTER), "sql/tokenizer.json", "README.md")
    assert chosen(names) == ["README.md", *ADAPTER]
    assert chosen(names, "sql") == [*ADAPTER, "tokenizer.json"]
    assert select_adapter(names, "sql", repo="acme/ink").subfolder == "sql"


def test_a_checkpoint_can_be_named_though_it_is_left_out_otherwise():
    names = listing(*ADAPTER, *(f"checkpoint-5/{name}" for name in ADAPTER))
    assert chosen(names) == list(ADAPTER)
    assert chosen(names, "checkpoint-5") == list(ADAPTER)


def test_one_weight_file_comes_with_the_configs_beside_it():
    names = listing("a.safetensors", "b.safetensors", "README.md", "adapter_config.json")
    assert chosen(names, "b.safetensors") == ["README.md", "adapter_config.json", "b.safetensors"]
    selection = select_adapter({f"x/{name}": pin for name, pin in names.items()}, "x/a.safetensors", repo="acme/ink")
    assert (selection.subfolder, selection.file) == ("x", "a.safetensors")
    assert "b.safetensors" not in selection.files


def test_a_file_that_is_no_weight_file_is_not_an_adapter():
    with pytest.raises(UsageError, match=r"README\.md is not a weight file"):
        chosen(listing(*ADAPTER, "README.md"), "README.md")


def test_several_adapters_without_one_at_the_top_are_listed():
    with pytest.raises(NotFound, match="holds 2: ink, sql") as caught:
        chosen(listing(*(f"{folder}/{name}" for folder in ("sql", "ink") for name in ADAPTER), "README.md"))
    assert "acme/ink/ink" in caught.value.hint


def test_a_missing_folder_is_answered_with_the_nearest():
    with pytest.raises(NotFound) as caught:
        chosen(listing(*(f"sql/{name}" for name in ADAPTER)), "sqk")
    assert "'sql'" in caught.value.hint


def test_a_base_model_is_told_from_an_adapter():
    with pytest.raises(NotFound, match="base model"):
        chosen(listing("config.json", "model.safetensors"))


def test_pickled_weights_are_named_as_the_reason():
    with pytest.raises(NotFound, match="pickles"):
        chosen(listing("adapter_config.json", "adapter_model.bin"))


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "a\\..\\b.safetensors", "/etc/x.safetensors", "x\0.safetensors"]
)
def test_a_hostile_name_that_would_be_written_is_refused(name):
    with pytest.raises(UnsafePath):
        chosen(listing(*ADAPTER, name))


def test_a_hostile_name_that_would_not_be_written_is_left_alone():
    assert chosen(listing(*ADAPTER, "../evil.sh", "what?.png")) == list(ADAPTER)


def test_a_listed_size_beyond_all_reason_is_refused_before_a_byte_moves():
    with pytest.raises(IntegrityError, match="larger"):
        chosen(listing(*ADAPTER) | listing("tokenizer.json", size=1 << 40))


def test_a_base_is_its_plain_weights_once_with_configs_and_tokenizer():
    names = listing("config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "tokenizer.json")
    names |= listing("onnx/model.onnx", "model-00001-of-00001.safetensors", "vocab.txt", "train.py", "x.h5")
    found = sorted(select_base(names, "", repo="acme/base").files)
    assert found == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]


def test_a_sharded_base_is_all_shards_and_the_index():
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = listing("config.json", "model.safetensors.index.json", "consolidated.safetensors", *shards)
    found = sorted(select_base(names, "", repo="acme/base").files)
    assert found == ["config.json", *shards, "model.safetensors.index.json"]


def test_a_pipeline_brings_its_component_folders():
    names = listing("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors")
    names |= listing("unet/diffusion_pytorch_model.fp16.safetensors", "vae/deep/x.safetensors", "sd_xl.safetensors")
    found = select_base(names, "", repo="acme/base").files
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= set(found)
    assert "vae/deep/x.safetensors" not in found
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in found


def test_a_base_with_pickles_alone_is_refused():
    with pytest.raises(NotFound, match="pickles"):
        select_base(listing("config.json", "pytorch_model.bin"), "", repo="acme/base")


def test_only_what_computes_counts_as_behaviour():
    assert [name for name in (*ADAPTER, "README.md", "tokenizer.json") if is_behaviour(name)] == list(ADAPTER)
