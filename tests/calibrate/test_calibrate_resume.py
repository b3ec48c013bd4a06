"""What a compression keeps on the disk: interrupted anywhere, and where the disk is full."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from calibration_cases import FAMILIES, calibrate, decoder, ids
from safetensors import SafetensorError
from safetensors.torch import save_file

import dcext
from dcext.calibrate import resume as resume_module
from dcext.calibrate.resume import KEY_NAME, ResumeFolder, job_key, remove_resume_folder

RATE = dcext.CompressionConfig(target_bits=5.0)
CONFIGS = {"rate": RATE, "paper": dcext.CompressionConfig(recipe="paper", alpha="layer")}


class JobInterruptedError(Exception):
    pass


def stop_after(steps: int):
    """Progress that ends a job when so many of its blocks are done."""
    left = steps

    def progress(label: str, share: float) -> None:
        nonlocal left
        left -= label != "sensitivity"
        if left < 0:
            raise JobInterruptedError

    return progress


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        assert torch.equal(found[name].payload, layer.payload), name
        assert found[name].report == layer.report


@pytest.mark.parametrize("recipe", list(CONFIGS))
@pytest.mark.parametrize(
    "family", ["llama", "gemma4_text", "t5", "llava", "jamba", "zamba", "unet"]
)
def test_interrupted_after_any_block_the_result_is_the_same(tmp_path, family, recipe):
    """Also where blocks read what others than the one before returned, and layers wait for a later block."""
    model, calibration = FAMILIES[family]()
    shares = []
    expected = calibrate(
        model, calibration, CONFIGS[recipe], progress=lambda label, share: shares.append(label)
    )
    blocks = len([label for label in shares if label != "sensitivity"])
    for steps in (1, blocks - 1):
        folder = tmp_path / str(steps)
        model, _ = FAMILIES[family]()
        progress = stop_after(steps)
        with pytest.raises(JobInterruptedError):
            calibrate(model, calibration, CONFIGS[recipe], ResumeFolder(folder, "key"), progress)
        model, _ = FAMILIES[family]()
        found = calibrate(model, calibration, CONFIGS[recipe], ResumeFolder(folder, "key"))
        assert_same(found, expected)


def test_a_chain_of_blocks_goes_on_without_running_those_that_are_done(tmp_path):
    model, calibration = decoder("llama", num_hidden_layers=4, num_key_value_heads=4)
    with pytest.raises(JobInterruptedError):
        calibrate(model, calibration, RATE, ResumeFolder(tmp_path, "key"), stop_after(2))
    model, _ = decoder("llama", num_hidden_layers=4, num_key_value_heads=4)
    ran = []
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(
            lambda module, args, i=i: ran.append((i, args[0].shape[0]))
        )
    calibrate(model, calibration, RATE, ResumeFolder(tmp_path, "key"))
    assert [i for i, windows in ran if windows == len(calibration)] == [2, 3]


def test_the_folder_stays_until_the_result_is_saved(tmp_path):
    """A job that is done is done at once when it is called again, since saving may have failed."""
    folder = tmp_path / "resume"
    model, calibration = FAMILIES["bart"]()
    expected = calibrate(model, calibration, RATE, ResumeFolder(folder, "key"))
    model, _ = FAMILIES["bart"]()
    ran = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.append(args))
    again = calibrate(model, calibration, RATE, ResumeFolder(folder, "key"))
    assert_same(again, expected)
    # Nothing but the window that tells how the model calls its blocks.
    assert all(t.shape[0] == 1 for args in ran for t in args if isinstance(t, torch.Tensor))
    remove_resume_folder(folder)
    assert not folder.exists()
    remove_resume_folder(folder)
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="expected a folder of a compression"):
        remove_resume_folder(tmp_path)


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_one_clear_error_and_what_was_kept_stays(tmp_path, monkeypatch, full):
    model, calibration = FAMILIES["t5"]()
    expected = calibrate(model, calibration, RATE)
    writes = 0

    def save(tensors, path, metadata=None) -> None:
        nonlocal writes
        writes += 1
        if writes > 5:
            path.write_bytes(b"half")
            raise full
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(resume_module, "save_file", save)
    model, _ = FAMILIES["t5"]()
    with pytest.raises(
        OSError, match=r"No space left .* steps before it are kept.*safetensors"
    ) as error:
        calibrate(model, calibration, RATE, ResumeFolder(tmp_path, "key"))
    assert error.value.errno == errno.ENOSPC
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    monkeypatch.undo()
    model, _ = FAMILIES["t5"]()
    assert_same(calibrate(model, calibration, RATE, ResumeFolder(tmp_path, "key")), expected)


def test_other_errors_keep_their_type(tmp_path, monkeypatch):
    def refuse(tensors, path, metadata=None) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = ResumeFolder(tmp_path / "resume", "key")
    monkeypatch.setattr(resume_module, "save_file", refuse)
    with pytest.raises(PermissionError):
        folder.save("state", {}, {})


def test_folders_whose_key_is_damaged_or_that_hold_pieces(tmp_path):
    folder = tmp_path / "resume"
    ResumeFolder(folder, "key").save("state", {}, {"calls": 0})
    piece = folder / ".state.safetensors.tmp-1-abcdef"
    piece.write_bytes(b"of a process that was killed")
    assert ResumeFolder(folder, "key").load("state") == ({}, {"calls": 0})
    assert not piece.exists()
    assert ResumeFolder(folder, "other").load("state") is None
    assert json.loads((folder / KEY_NAME).read_text()) == {"key": "other"}
    (folder / KEY_NAME).write_text("{")
    with pytest.raises(FileExistsError, match="found something else"):
        ResumeFolder(folder, "key")


def test_keys_tell_calibration_sets_apart():
    model, tokens = FAMILIES["bart"]()[0], ids()
    values = torch.randn(6, 3).bfloat16()
    sets = [
        tokens,
        {"input_ids": tokens},
        {"decoder_input_ids": tokens},
        {"input_ids": tokens, "x": values},
        {"input_ids": tokens, "x": values.reshape(3, 6)},
        {"input_ids": ids(seed=2)},
    ]
    keys = {job_key(model, calibration, {}) for calibration in sets}
    assert len(keys) == len(sets)
