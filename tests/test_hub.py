"""What goes to the Hub, with the Hub's client replaced at its outermost call (nothing is reachable in tests)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from zoo import tiny_siamese

from imsm import InputError, SiameseForCausalLM, checkpoint


class FakeHub:
    """Records what is uploaded."""

    uploaded: dict[str, bytes]

    def __init__(self, token: Any = None) -> None:
        pass

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **kwargs: Any) -> Any:
        type(self).uploaded = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


def test_push_uploads_the_checkpoint_with_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "HfApi", FakeHub)
    model = tiny_siamese("llama", "lora")
    model.config.base_model = "org/base"
    model.config.training = {"data": {"train": "shop.jsonl"}, "settings": {"epochs": 3}, "results": {"loss": 0.25}}
    assert model.push_to_hub("shop") == "https://hub/me/shop"
    assert set(checkpoint.REQUIRED) <= set(FakeHub.uploaded)
    card = FakeHub.uploaded["README.md"].decode()
    for expected in ("base_model: org/base", "| train | shop.jsonl |", "| epochs | 3 |", "| loss | 0.25 |", "LORA"):
        assert expected in card


def test_save_with_push(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "HfApi", FakeHub)
    FakeHub.uploaded = {}
    tiny_siamese("llama", "lora").save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="there")
    assert set(FakeHub.uploaded) == {path.name for path in (tmp_path / "here").iterdir()}


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="checkpoint 'org/nothing' is neither a folder here nor a repository"):
        SiameseForCausalLM.from_pretrained("org/nothing")
