"""The files of a folder are its own; a folder of the Hub's cache is made of links all the same."""

import pytest

from megablocks_utils.checkpoint.index import open_checkpoint, resolve_checkpoint_folder
from megablocks_utils.errors import CheckpointError
from tests.support.tiny_models import save_tiny_model


def move_into_a_cache(folder, cache):
    """Put a model folder into a cache as the Hub's client does; return the snapshot."""
    snapshot = cache / "models--someone--model" / "snapshots" / "0123abc"
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("sharded", [False, True])
def test_a_snapshot_of_the_cache_and_a_link_to_it_are_read(tmp_path, sharded):
    save_tiny_model("mixtral", tmp_path / "model", sharded=sharded)
    snapshot = move_into_a_cache(tmp_path / "model", tmp_path / "hub")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert len(open_checkpoint(resolve_checkpoint_folder(str(folder))).keys()) == 41


def replace_by_link(path, target):
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("sharded", "name"),
    [
        (False, "model.safetensors"),
        (True, "model-00002-of-00009.safetensors"),
        (True, "model.safetensors.index.json"),
        (True, "config.json"),
    ],
)
def test_a_link_out_of_the_folder_is_refused(tmp_path, sharded, name):
    model = tmp_path / "model"
    save_tiny_model("mixtral", model, sharded=sharded)
    replace_by_link(model / name, tmp_path / "outside")
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint_folder(str(model))
    message = f"{model / name} leads out of its folder, to {(tmp_path / 'outside').resolve()}: put"
    assert str(error.value).startswith(message)
    if name.endswith(".safetensors"):
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            open_checkpoint(model)


def test_a_link_of_a_snapshot_to_another_repository_is_refused(tmp_path):
    save_tiny_model("mixtral", tmp_path / "model", sharded=False)
    snapshot = move_into_a_cache(tmp_path / "model", tmp_path / "hub")
    replace_by_link(snapshot.parents[1] / "blobs" / "2", tmp_path / "hub" / "secret")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        resolve_checkpoint_folder(str(snapshot))


def test_links_within_the_folder_and_of_files_that_nobody_reads_are_left_alone(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    replace_by_link(tmp_path / "model.safetensors", tmp_path / "weights")
    (tmp_path / "notes").symlink_to("/etc")
    resolve_checkpoint_folder(str(tmp_path))
    assert len(open_checkpoint(tmp_path).keys()) == 41


def test_a_circle_of_links(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link that leads nowhere"):
        resolve_checkpoint_folder(str(tmp_path))


def test_a_pointer_of_lfs_in_place_of_a_tokenizer(tmp_path):
    save_tiny_model("mixtral", tmp_path, sharded=False)
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint_folder(str(tmp_path))
    assert str(error.value).startswith(f"{path} is a pointer of Git LFS, not the file itself")
