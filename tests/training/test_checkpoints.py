"""Checkpoints: the same bits back, and one sentence for every file that is not one."""

import errno
import json
import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from probes import same_bits, small_config

from trpo_jax import Categorical, UsageError, init, load, save
from trpo_jax.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def config():
    return small_config(probes.Countdown(), normalize_observations=True)


@pytest.fixture(scope="module")
def state(config):
    return jax.jit(lambda key: init(config, key))(jax.random.key(3))


@pytest.fixture
def path(tmp_path, state):
    save(tmp_path / "state.npz", state)
    return tmp_path / "state.npz"


def test_a_state_comes_back_bit_for_bit(path, config, state):
    loaded = load(path, config)
    assert same_bits(loaded, state)
    assert all(
        isinstance(leaf, jax.Array) and not getattr(leaf, "weak_type", False) for leaf in jax.tree.leaves(loaded)
    )
    assert jax.random.key_impl(loaded.key) == jax.random.key_impl(state.key)
    assert same_bits(load(path, like=state), state)
    assert same_bits(load(str(path), jax.eval_shape(lambda: state)), state)


def test_every_dtype_and_odd_number_comes_back(tmp_path):
    tree = {
        "float32": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "int": jnp.array([-1, 2**31 - 1], jnp.int32),
        "uint8": jnp.arange(3, dtype=jnp.uint8),
        "bool": jnp.array([True, False]),
        "float16": jnp.array([1.5], jnp.float16),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(2, impl="rbg"), 4),
        "nested": [jnp.float32(1), (jnp.int32(2),)],
    }
    save(tmp_path / "tree", tree)
    assert same_bits(load(tmp_path / "tree", tree), tree)


def test_bfloat16_comes_back(tmp_path):
    tree = {"w": jnp.array([1.0, -2.5], jnp.bfloat16)}
    save(tmp_path / "tree", tree)
    assert same_bits(load(tmp_path / "tree", tree), tree)


def test_agents_stacked_along_leading_axes_load_with_the_settings_of_one(tmp_path, config):
    for shape in ((3,), (2, 2)):
        many = jax.vmap(lambda key: init(config, key))
        many = many if len(shape) == 1 else jax.vmap(many)
        states = jax.jit(many)(jax.random.split(jax.random.key(0), shape))
        save(tmp_path / "many.npz", states)
        assert same_bits(load(tmp_path / "many.npz", config), states)


def test_agents_of_different_numbers_are_refused(tmp_path, config, state):
    two = jax.jit(jax.vmap(lambda key: init(config, key)))(jax.random.split(jax.random.key(0), 2))
    save(tmp_path / "mixed.npz", {**vars(two), "iteration": state.iteration})
    with pytest.raises(UsageError, match=r"mixed\.npz does not fit .*different numbers of agents"):
        load(tmp_path / "mixed.npz", vars(state))


def test_nothing_in_the_archive_is_a_pickle(path):
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert all(array.dtype != object for array in arrays.values())
    header = json.loads(bytes(arrays["__header__"]))
    assert header["keys"] == {".key": "threefry2x32"} and header["format"].startswith("trpo_jax state")
    assert ".learner.policy_params['w']" in arrays


def refusal(path, like):
    """The sentence that refuses a file; it must name the file."""
    with pytest.raises(UsageError) as caught:
        load(path, like)
    text = str(caught.value)
    assert str(path) in text and text.endswith(".") and "\n" not in text
    return text


def test_a_missing_file(tmp_path, config):
    assert refusal(tmp_path / "none.npz", config).startswith("there is no checkpoint")


def test_a_folder(tmp_path, path, config):
    assert refusal(tmp_path, config) == f"{tmp_path} is a folder; name a checkpoint, such as {path}."
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        folder.mkdir()
        assert refusal(folder, config) == f"{folder} is a folder; name a checkpoint in it."
    newest = path.rename(tmp_path / "run" / "checkpoints" / "00000002.npz")
    assert refusal(tmp_path / "run", config).endswith(f"such as {newest}.")


def test_no_advice_destroys(path, config):
    path.write_bytes(path.read_bytes()[:100])
    assert "remove" not in refusal(path, config)


def test_a_truncated_file(path, config):
    content = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(content), 101), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "damaged or not a checkpoint" in refusal(path, config)


def flipped(content, position, bit):
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def positions_of_interest(content):
    """The archive's directory and the first entry's header byte by byte, the rest in strides."""
    directory = content.rindex(b"PK\x05\x06")
    start = int.from_bytes(content[directory + 16 : directory + 20], "little")
    return [*range(0, 128), *range(128, start, 97), *range(start, start + 128), *range(directory, len(content))]


def test_a_flipped_bit_is_found_or_harmless(path, config, state):
    """Data stand under a checksum; in the archive's own records a flip either breaks it or touches a date."""
    content = path.read_bytes()
    refused, positions = 0, positions_of_interest(content)
    for position in positions:
        path.write_bytes(flipped(content, position, position % 8))
        try:
            loaded = load(path, config)
        except UsageError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert same_bits(loaded, state), position
    assert refused > len(positions) // 3


@pytest.mark.parametrize("bit", range(8))
def test_any_bit_of_the_first_directory_entry(path, config, state, bit):
    """Flags, versions and compression methods: zipfile answers each kind of damage with another exception."""
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    for position in range(start, start + 46):
        path.write_bytes(flipped(content, position, bit))
        try:
            assert same_bits(load(path, config), state)
        except UsageError as error:
            assert str(path) in str(error)


def test_foreign_files(tmp_path, config):
    path = tmp_path / "foreign.npz"
    np.savez(path, weights=np.zeros(3))
    assert "damaged or not a checkpoint" in refusal(path, config)
    np.savez(path, __header__=np.frombuffer(b"[]", np.uint8))
    refusal(path, config)
    np.savez(path, __header__=np.frombuffer(b"\xff\xfe", np.uint8))
    refusal(path, config)
    alone = "an earlier version of trpo_jax, whose states this one cannot read; continue with that one, or train again"
    for number, words in ((1, alone), (9, "a later version of trpo_jax")):
        header = json.dumps({"format": f"trpo_jax state {number}", "keys": {}}).encode()
        np.savez(path, __header__=np.frombuffer(header, np.uint8))
        assert f"{path} was saved by {words}" in refusal(path, config)
    # Unpickling runs whatever code a file names: an array of objects is refused by its header, with no pickle after it.
    with zipfile.ZipFile(path, "w") as archive, archive.open("weights.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    assert "damaged or not a checkpoint" in refusal(path, config)
    path.write_text("a note")
    refusal(path, config)
    np.save(tmp_path / "single.npy", np.zeros(3))
    refusal(tmp_path / "single.npy", config)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not an array")
    refusal(path, config)


def test_other_settings(path, config):
    assert ".actor.env_state" in refusal(path, config.replace(num_envs=8))
    three = probes.linear_policy(actions=3)  # and two of them used
    two = three._replace(apply=lambda *inputs: Categorical(three.apply(*inputs).logits[..., :2]))
    wide = config.replace(policy=two)
    text = refusal(path, wide)
    assert ".learner.policy_params" in text and "settings it was saved with" in text
    assert "is float32[2], but the settings need float32[3]" in text
    assert "contains no .learner.policy_params" in refusal(path, config.replace(policy=None))
    assert "it also has" in refusal(path, {})


def test_another_environment(tmp_path, path, config):
    settings = {"policy": probes.linear_gaussian(2, 2), "value": probes.linear_value(2)}
    refusal(path, small_config(probes.RecordAction(shape=(2,)), **settings))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_the_old_file(path, config, state, monkeypatch, error):
    before = path.read_bytes()

    def fail(file, *_, **__):
        file.write(b"half a file")
        raise error

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(UsageError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save(path, state)
    assert path.read_bytes() == before and same_bits(load(path, config), state)
    if isinstance(error, OSError):
        assert (
            str(caught.value)
            == f"cannot write {path}: No space left on device; choose a folder that can be written to."
        )
    assert os.listdir(path.parent) == [path.name]


def test_equal_states_are_equal_files(path, state, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    save(path.with_name("later.npz"), state)
    assert path.with_name("later.npz").read_bytes() == path.read_bytes()


def test_places_that_cannot_be_written_to(tmp_path, state):
    (tmp_path / "file").write_text("in the way")
    for target in (tmp_path / "file" / "state.npz", tmp_path / "folder.npz"):
        (tmp_path / "folder.npz").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=r"cannot write .*; choose a folder that can be written to\.$") as caught:
            save(target, state)
        assert str(target) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.npz"]


def test_saving_makes_folders_and_replaces(tmp_path, config, state):
    path = tmp_path / "a" / "b" / "state.npz"
    save(path, {"old": jnp.zeros(3)})
    save(path, state)
    assert same_bits(load(path, config), state)
    assert os.listdir(path.parent) == ["state.npz"]


def refuse(saved):
    raise UsageError("rows are lost; restore them.")


def test_the_newest_sound_checkpoint_is_used_and_what_is_passed_over_is_said(tmp_path, capsys):
    tree = {"w": np.arange(3.0)}
    ours = Checkpoints(tmp_path, "ours", "run", prefix="a-", kept=2)
    for done in (1, 2, 3):
        ours.save({"w": tree["w"] + done}, done, rows=done)
    assert [file.name for file in ours.files()] == ["a-00000003.npz", "a-00000002.npz"]
    saved = ours.newest(lambda done: tree)
    assert saved.done == saved.note["rows"] == 3 and np.array_equal(saved.state["w"], tree["w"] + 3)
    assert capsys.readouterr().err == ""
    (tmp_path / "a-00000003.npz").write_bytes(b"")
    assert ours.newest(lambda done: tree).done == 2
    assert "a-00000003.npz is damaged" in (said := capsys.readouterr().err) and "is used, a-00000002.npz." in said
    with pytest.raises(UsageError, match=r"a-00000003\.npz is damaged"):
        ours.newest(lambda done: tree, refuse)
    assert Checkpoints(tmp_path, "ours", "run", prefix="b-").newest(lambda done: tree) is None


def test_checkpoints_of_other_work_or_another_iteration_are_not_taken(tmp_path):
    tree = {"w": np.arange(3.0)}
    Checkpoints(tmp_path, "theirs", "run").save(tree, 4)
    ours = Checkpoints(tmp_path, "ours", "run")
    with pytest.raises(UsageError, match=r"00000004\.npz belongs to another run; restore the right one, or train"):
        ours.newest(lambda done: tree)
    ours.save(tree, 5)
    assert [file.name for file in ours.files()] == ["00000005.npz"]  # what is older goes
    (tmp_path / "00000005.npz").rename(tmp_path / "00000009.npz")
    with pytest.raises(UsageError, match=r"00000009\.npz is from iteration 5, unlike its name"):
        ours.newest(lambda done: tree)
    ours.drop()
    assert ours.newest(lambda done: tree) is None
