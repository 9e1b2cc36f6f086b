"""The segmentation experiment: its scenes, its scores, its folders, and runs that are killed."""

import dataclasses
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from PIL import ExifTags, Image
from sklearn.datasets import load_digits
from test_vocabulary import end_held

from experiments import _checkpoints, _runs
from experiments._checkpoints import Checkpoint, latest_whole, read_record, read_state, save
from experiments._door import InputError, enter
from experiments.segmentation import __main__ as segmentation
from experiments.segmentation import streets
from experiments.segmentation.__main__ import Config, run
from experiments.segmentation.coding import Coding
from experiments.segmentation.colours import read_colours
from experiments.segmentation.files import read_mask, read_photograph
from experiments.segmentation.layouts import EXPECTED, IMAGES, MASKS
from experiments.segmentation.network import DEEPER, GROUPS, WIDTHS, apply_network, init_network, normalise
from experiments.segmentation.photographs import class_names, read_folder
from experiments.segmentation.pictures import palette_of, voc_palette
from experiments.segmentation.scenes import VOID, Pair, digit_scenes, read_digits
from experiments.segmentation.trained import read_trained
from experiments.segmentation.training import (
    batches,
    confusion,
    logits_of,
    loss_of,
    pad,
    random_crop,
    random_view,
    recipe_of,
    score,
)  # fmt: skip
from jaxsoft import cross_entropy

pytestmark = [pytest.mark.scripts, pytest.mark.x32]

STEPS = 7
SMALL = (8, 16)
PICTURES = ("plot_examples", "plot_classes", "plot_loss")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Networks that compile in seconds. Equal optimizers are one object, so that runs share compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WIDTHS", "DEEPER"):
            patch.setattr(segmentation, name, SMALL)
        for name in ("warmup_cosine_decay_schedule", "adamw"):
            patch.setattr(optax, name, functools.cache(getattr(optax, name)))
        yield


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """No pictures, except from the fixture `whole`, whose run comes before."""
    for name in PICTURES:
        monkeypatch.setattr(segmentation, name, lambda *_: None)


def config(out, **options):
    return Config(**{"steps": STEPS, "batch_size": 2, "crop": 32, "checkpoint_every": 2, "out": out} | options)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Five photographs of five sizes, two of them PNG, with palette and greyscale masks of three classes."""
    folder = tmp_path_factory.mktemp("voc")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for n, (height, width) in enumerate([(30, 50), (64, 40), (33, 33), (20, 20), (41, 70)]):
        labels = RNG.integers(0, 3, (height, width), np.uint8)
        labels[:2] = VOID
        Image.fromarray(np.stack([80 * labels] * 3, -1)).save(folder / f"JPEGImages/{n}.{'png' if n % 2 else 'jpg'}")
        mask = Image.fromarray(labels)
        if n % 2:
            mask.putpalette([*range(256)] * 3)
        mask.save(folder / f"SegmentationClass/{n}.png")
    (folder / "ImageSets/Segmentation/train.txt").write_text("0\n1\n2\n")
    (folder / "ImageSets/Segmentation/val.txt").write_text("3\n4\n\n")
    return folder


@pytest.fixture(scope="module")
def whole(voc, tmp_path_factory):
    """A run on the folder without interruption."""
    out = tmp_path_factory.mktemp("whole")
    return run(config(out, data=str(voc))), out


def parameters(out, step=STEPS):
    """The parameters, read back by NumPy without the experiment's code, as bytes."""
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == str(step)
    with np.load(out / "checkpoints" / str(step) / "state.npz") as state:
        return {name: array.tobytes() for name, array in state.items()}


# Scenes.


def test_the_shipped_digits_are_scikit_learns():
    pixels, digits = read_digits()
    np.testing.assert_array_equal(digits, load_digits().target)
    np.testing.assert_array_equal(pixels, (255 * load_digits().images / 16).astype(np.uint8))


def test_scenes_depend_on_seed_and_index_alone():
    train, test = digit_scenes(3, 48, 5)
    scene = train[7].image
    again, _ = digit_scenes(3, 48, 5)
    assert (again[2].image != scene).any()
    np.testing.assert_array_equal(again[7].image, scene)
    assert (digit_scenes(4, 48, 5)[0][7].image != scene).any()
    assert (test[4].image != train[4].image).any()
    assert len(test) == 5


def test_training_and_held_out_digits_are_different_and_complete():
    train, test = digit_scenes(0, 64, 1)
    everything = read_digits()[0]
    together = np.concatenate([train.pixels, test.pixels])
    assert sorted(d.tobytes() for d in together) == sorted(d.tobytes() for d in everything)
    assert len(np.unique(test.digits)) == 10


def test_every_class_occurs_and_every_digit_has_a_void_border():
    train, _ = digit_scenes(0, 64, 1)
    seen = set()
    for n in range(40):
        image, labels = train[n]
        assert image.shape == (64, 64, 3)
        assert image.dtype == labels.dtype == np.uint8
        seen |= set(np.unique(labels).tolist())
        for axis in (0, 1):
            a, b = (labels[:-1], labels[1:]) if axis == 0 else (labels[:, :-1], labels[:, 1:])
            assert not ((a != b) & (a != VOID) & (b != VOID)).any()  # no two classes ever touch
    assert seen == {*range(11), VOID}


# Loader.


def test_batches_are_the_same_from_any_position(voc):
    train, *_ = read_folder(voc)
    all_of_them = batches(train, 2, 32, seed=5)
    expected = [next(all_of_them) for _ in range(6)]
    for start in (1, 4):
        moved = batches(train, 2, 32, seed=5)
        for _ in range(start):
            next(moved)
        position = json.loads(json.dumps(moved.get_state()))
        fresh = batches(train, 2, 32, seed=5)
        fresh.set_state(position)
        for batch in expected[start:]:
            found = next(fresh)
            np.testing.assert_array_equal(found.image, batch.image)
            np.testing.assert_array_equal(found.labels, batch.labels)


def test_crops_are_windows_and_small_images_are_padded_with_void():
    image = RNG.integers(1, 256, (40, 20, 3), np.uint8)
    pair = Pair(image, image[..., 0] // 2)
    cropped = random_crop(pair, np.random.default_rng(1), 32)
    assert cropped.image.shape == (32, 32, 3)
    assert (cropped.labels[:, 20:] == VOID).all()
    np.testing.assert_array_equal(cropped.image[:, :20, 0] // 2, cropped.labels[:, :20])
    assert any((cropped.image[:, :20] == image[top : top + 32]).all() for top in range(9))
    assert pad(pair, 10, 10).image.shape == image.shape


def test_views_keep_image_and_labels_together_mirrored_and_scaled():
    """A ramp from left to right, as labels and as grey levels. The brightness changes all grey levels equally."""
    ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    pair, directions, widths = Pair(np.stack([ramp] * 3, -1), ramp), set(), set()
    for seed in range(20):
        image, labels = random_view(pair, np.random.default_rng(seed), 64)
        assert image.shape == (64, 64, 3)
        levels = labels[0].astype(int)
        directions.add(np.sign(levels[-1] - levels[0]))
        widths.add(abs(levels[-1] - levels[0]))
        bright, dark = (image[:, levels == level].mean() for level in (levels.max(), levels.min()))
        assert bright > dark
    assert directions == {-1, 1}
    assert min(widths) < 50
    assert max(widths) > 80


def test_classes_are_weighted_by_the_root_of_their_rarity_and_colours_normalised():
    labels = np.repeat(np.uint8([0, 1, VOID]), [90, 10, 20]).reshape(12, 10)
    image = RNG.integers(0, 256, (12, 10, 3), np.uint8)
    mean, deviation, weights = recipe_of([Pair(image, labels)], 3)
    np.testing.assert_allclose(mean, image.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(deviation, image.std((0, 1)), rtol=1e-5)
    assert weights[1] / weights[0] == pytest.approx(3)
    assert 0.9 * weights[0] + 0.1 * weights[1] == pytest.approx(1)
    assert np.isfinite(weights[2])  # the class that is absent


# Network and scores.


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_network, static_argnums=(1, 2))(jax.random.key(0), 11, SMALL)


@pytest.fixture(scope="module")
def scene():
    """A scene with void pixels, as a batch of one."""
    image, labels = digit_scenes(0, 32, 1)[0][0]
    assert (labels == VOID).any()
    return Pair(image[None], labels[None])


@jax.jit
def judge(params, batch):
    """Logits, prediction, and the loss with its gradients to parameters and logits."""
    (loss, predicted), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
    logits = logits_of(params, batch.image)
    return logits, predicted, loss, gradient, jax.grad(cross_entropy)(logits, batch.labels, ignore_index=VOID)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 8)])
@pytest.mark.parametrize("widths", [WIDTHS, DEEPER])
def test_the_network_scores_every_pixel_of_any_size(widths, size):
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    params = jax.eval_shape(functools.partial(init_network, classes=11, widths=widths), jax.random.key(0))
    assert jax.eval_shape(apply_network, params, images) == jax.ShapeDtypeStruct((2, *size, 11), jnp.float32)


def test_an_images_scores_do_not_depend_on_its_batch(params):
    images = RNG.normal(size=(3, 40, 24, 3)).astype(np.float32)
    together, alone = jax.jit(lambda p: (apply_network(p, images), apply_network(p, images[1:2])))(params)
    np.testing.assert_allclose(together[1:2], alone, atol=1e-6)


def test_groups_of_channels_have_mean_0_and_deviation_1_in_each_image():
    x = 3 + RNG.normal(size=(2, 5, 7, 3 * GROUPS)).astype(np.float32) * np.array([2, 9])[:, None, None, None]
    for image in np.asarray(normalise(jnp.asarray(x, jnp.float32))):
        groups = image.reshape(35, GROUPS, 3)
        np.testing.assert_allclose(groups.mean((0, 2)), 0, atol=1e-6)
        np.testing.assert_allclose(groups.std((0, 2)), 1, atol=1e-5)


def test_void_pixels_have_gradient_exactly_zero(params, scene):
    gradient = np.asarray(judge(params, scene)[-1])
    assert (gradient[scene.labels == VOID] == 0).all()
    assert (gradient[scene.labels != VOID] != 0).all()


def test_a_batch_of_void_pixels_changes_no_parameter(params, scene):
    void = Pair(scene.image, np.full_like(scene.labels, VOID))
    for leaf in jax.tree.leaves(judge(params, void)[3]):
        assert (np.asarray(leaf) == 0).all()


def test_loss_is_the_mean_over_the_pixels_that_are_not_void(params, scene):
    logits, predicted, loss, *_ = jax.device_get(judge(params, scene))
    pixels = zip(logits.astype(float).reshape(-1, 11), scene.labels.ravel(), strict=True)
    assert loss == pytest.approx(np.mean([np.log(np.exp(z - z[y]).sum()) for z, y in pixels if y != VOID]), rel=1e-6)
    np.testing.assert_array_equal(predicted, logits.argmax(-1))


def test_scores_of_a_counted_example():
    """Six valid pixels: class 0 has IoU 2/4, class 1 1/3, class 2 1, and class 3 is met at void pixels alone."""
    truth = np.uint8([[0, 0, 0, 1], [1, 2, VOID, VOID]])
    guess = np.uint8([[0, 0, 1, 1], [0, 2, 3, 0]])
    found = score(confusion(truth, guess, 4))
    assert found["per_class_iou"] == pytest.approx([2 / 4, 1 / 3, 1.0, None])
    assert found["mean_iou"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert found["pixel_accuracy"] == pytest.approx(4 / 6)
    assert found["valid_pixels"] == 6


# Runs.


def assert_learnt(summary, out):
    metrics = pd.read_csv(out / "metrics.csv")
    scores = ["pixel_accuracy", "mean_iou"]
    assert list(metrics) == ["step", "loss", *scores, *(f"held_out_{name}" for name in scores)]
    assert metrics[["held_out_pixel_accuracy", "held_out_mean_iou"]].iloc[-1].tolist() == [summary[s] for s in scores]
    assert metrics["step"].tolist() == list(range(1, STEPS + 1))
    assert metrics["loss"].iloc[0] == pytest.approx(np.log(3), abs=0.05)
    assert metrics["loss"].iloc[-1] < metrics["loss"].iloc[0]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary) == {"pixel_accuracy", "mean_iou", "per_class_iou", "valid_pixels", "steps", "seconds"}
    assert summary["valid_pixels"] == 18 * 20 + 39 * 70
    assert len(summary["per_class_iou"]) == 3


def test_learns_a_folder_of_differing_sizes(whole):
    summary, out = whole
    assert_learnt(summary, out)
    assert {path.name for path in out.glob("*.*")} == {
        "metrics.csv", "network.json", "summary.json", "examples.png", "classes.png", "loss.png"
    }  # fmt: skip


def assert_same(found, expected):
    """Rows and parameters, to the bit, and the summary."""
    (summary, out), (known, whole) = found, expected
    assert (out / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert parameters(out) == parameters(whole)
    assert {**summary, "seconds": 0} == {**known, "seconds": 0}


def test_an_interrupted_run_resumes_bit_for_bit(voc, whole, tmp_path, monkeypatch, capfd):
    """Ctrl-C, with everything that a terminal shows."""
    options = ["--steps=7", "--batch-size=2", "--crop=32", "--checkpoint-every=2", f"--data={voc}", f"--out={tmp_path}"]
    append = _runs.append

    def interrupt(path, row):
        append(path, row)
        if row[0] == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["segmentation", *options])
        patch.setattr(_runs, "append", interrupt)
        with pytest.raises(SystemExit) as ended:
            enter(Config, run, None)
    assert ended.value.code == 130
    output = "".join(capfd.readouterr())
    assert "Traceback" not in output
    assert output.endswith("\ninterrupted; --resume continues\n")
    assert (tmp_path / "metrics.csv").read_bytes().count(b"\n") == 1 + 5
    assert_same((run(config(tmp_path, data=str(voc), resume=True)), tmp_path), whole)


@pytest.mark.exhaustive
def test_the_network_for_photographs_learns_and_resumes_bit_for_bit(voc, tmp_path, monkeypatch):
    """At its own size, in a separate process that Ctrl-C ends."""
    monkeypatch.setattr(segmentation, "DEEPER", DEEPER)
    options = [config(tmp_path / name, data=str(voc)) for name in ("whole", "interrupted")]
    whole = run(options[0]), options[0].out
    assert_learnt(*whole)
    output, status = end_held("experiments.segmentation", options[1], options[1].out / "metrics.csv", 5, signal.SIGINT)
    assert status == 130
    assert "Traceback" not in output
    assert output.endswith("\ninterrupted; --resume continues\n")
    assert_same((run(dataclasses.replace(options[1], resume=True)), options[1].out), whole)


class Stopped(Exception):
    pass


def stopped_at(monkeypatch, configuration, step):
    """Run and stop as if killed when the row of `step` is about to be written."""
    append = _runs.append

    def stop(path, row):
        if row[0] == step:
            with path.open("a") as file:
                file.write(f"{step},0.")  # torn
            raise Stopped
        append(path, row)

    with monkeypatch.context() as patch:
        patch.setattr(_runs, "append", stop)
        with pytest.raises(Stopped):
            run(configuration)


def halve_arrays(checkpoint):
    os.truncate(checkpoint / "state.npz", (checkpoint / "state.npz").stat().st_size // 2)


def flip_a_bit(checkpoint):
    content = bytearray((checkpoint / "state.npz").read_bytes())
    content[len(content) // 2] ^= 16
    (checkpoint / "state.npz").write_bytes(content)


def halve_record(checkpoint):
    os.truncate(checkpoint / "record.json", 5)


def halve_checksums(checkpoint):
    (checkpoint / "sha256.json").write_text('{"state')


def empty(checkpoint):
    for path in checkpoint.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [halve_arrays, flip_a_bit, halve_record, halve_checksums, empty])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capfd, damage):
    state = {"x": jnp.arange(4.0), "y": (jnp.ones((20, 30)), jnp.int32(3))}
    for step in (1, 2, 3):
        save(tmp_path, Checkpoint(step, state, {"step": step}))
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}
    damage(tmp_path / "3")
    assert latest_whole(tmp_path) == 2
    assert capfd.readouterr().err == f"{tmp_path}/3: damaged, taking the checkpoint before it\n"
    assert read_record(tmp_path, 2) == {"step": 2}
    found = read_state(tmp_path, 2, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for array, expected in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    save(tmp_path, Checkpoint(3, state, {}))
    assert latest_whole(tmp_path) == 3


@pytest.mark.parametrize("damage", [flip_a_bit, empty])
def test_nothing_is_deleted_if_every_checkpoint_is_damaged(voc, tmp_path, monkeypatch, damage):
    """The run does not restart over existing rows, and no checkpoint is deleted; --overwrite does both."""
    options = config(tmp_path, data=str(voc))
    stopped_at(monkeypatch, options, 6)
    rows = (tmp_path / "metrics.csv").read_bytes()
    for step in (2, 4):
        damage(tmp_path / "checkpoints" / str(step))
    with pytest.raises(
        InputError, match=r"checkpoints: expected a complete checkpoint, got only damaged ones \(4, 2\)"
    ):
        run(dataclasses.replace(options, resume=True))
    assert (tmp_path / "metrics.csv").read_bytes() == rows
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}
    run(dataclasses.replace(options, overwrite=True))
    assert (tmp_path / "metrics.csv").read_bytes().count(b"\n") == 1 + STEPS
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"6", "7"}


@pytest.mark.parametrize(("owner", "last"), [(_checkpoints, "checksums"), (pathlib.Path, "rename")])
def test_a_truncated_checkpoint_is_damaged(tmp_path, monkeypatch, owner, last):
    """By Ctrl-C or a kill, here before its checksums or its name; the next checkpoint replaces it."""

    def interrupted(*_):
        raise KeyboardInterrupt

    save(tmp_path, Checkpoint(1, {"x": jnp.arange(4.0)}, {}))
    with monkeypatch.context() as patch:
        patch.setattr(owner, last, interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, Checkpoint(2, {"x": jnp.arange(5.0)}, {}))
    assert latest_whole(tmp_path) == 1
    save(tmp_path, Checkpoint(2, {"x": jnp.arange(5.0)}, {}))
    assert latest_whole(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_run_resumes_bit_for_bit_from_the_checkpoint_before_a_damaged_one(voc, whole, tmp_path, monkeypatch):
    stopped_at(monkeypatch, config(tmp_path, data=str(voc)), 6)
    halve_arrays(tmp_path / "checkpoints" / "4")
    assert_same((run(config(tmp_path, data=str(voc), resume=True)), tmp_path), whole)


def test_resume_starts_without_a_checkpoint_and_stops_at_the_last_step(voc, whole, tmp_path, monkeypatch):
    stopped_at(monkeypatch, config(tmp_path, data=str(voc)), 2)
    for _ in range(2):
        assert_same((run(config(tmp_path, data=str(voc), resume=True)), tmp_path), whole)


def test_an_unfinished_run_is_neither_overwritten_nor_continued_with_other_options(voc, tmp_path, monkeypatch):
    options = config(tmp_path, data=str(voc))
    stopped_at(monkeypatch, options, 3)
    with pytest.raises(InputError, match="holds an unfinished run: continue it with --resume, replace it with --over"):
        run(options)
    with pytest.raises(InputError, match=r"--learning-rate: .*checkpoints was written with 0.003, got 0.1"):
        run(dataclasses.replace(options, resume=True, learning_rate=0.1))
    with pytest.raises(InputError, match=r"--classes: .*checkpoints was written with 3, got 4"):
        run(dataclasses.replace(options, resume=True, classes=4))
    (tmp_path / "metrics.csv").write_text("step,loss,pixel_accuracy,mean_iou\n")
    with pytest.raises(InputError, match=r"metrics.csv: expected the rows of steps 1 to 2, from which the checkpoint"):
        run(dataclasses.replace(options, resume=True))


def test_resume_without_the_data_of_the_run_does_not_fall_back_to_the_digits(voc, tmp_path, monkeypatch, capsys):
    stopped_at(monkeypatch, config(tmp_path, data=str(voc)), 3)
    message = f"--data: {tmp_path} is a run on {voc}, got digits: --resume needs the same options, here --data {voc}"
    for steps in (STEPS, None):
        with pytest.raises(InputError) as caught:
            run(config(tmp_path, resume=True, steps=steps))
        assert str(caught.value) == message
    capsys.readouterr()
    stopped_at(monkeypatch, config(tmp_path / "none", resume=True), 1)
    assert (
        f"{tmp_path / 'none'}: no checkpoint to resume from: starting at step 1, on digits" in capsys.readouterr().err
    )


def test_a_finished_run_is_replaced_only_with_overwrite(voc, whole, tmp_path):
    run(config(tmp_path, data=str(voc), seed=1))
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match="holds a finished run: replace it with --overwrite, or choose another --out"):
        run(config(tmp_path, data=str(voc)))
    shutil.rmtree(tmp_path / "checkpoints")  # to save space; what is left is no less finished
    with pytest.raises(InputError, match="holds a finished run"):
        run(config(tmp_path, data=str(voc), resume=True))
    assert (tmp_path / "metrics.csv").read_bytes() == before
    run(config(tmp_path, data=str(voc), overwrite=True))
    assert parameters(tmp_path) == parameters(whole[1])


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, capfd):
    """A limit on the size of files in place of the disk's: writing fails in the same way."""
    save(tmp_path, Checkpoint(1, {"x": jnp.arange(4.0)}, {"n": 0.1}))
    noise = jnp.asarray(np.random.default_rng(0).random((8, 100_000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(InputError) as caught:
            save(tmp_path, Checkpoint(2, {"x": list(noise)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"{tmp_path}/2: cannot write the checkpoint: File too large"
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert latest_whole(tmp_path) == 1
    assert read_record(tmp_path, 1) == {"n": 0.1}
    np.testing.assert_array_equal(read_state(tmp_path, 1, {"x": jnp.arange(4.0)})["x"], [0, 1, 2, 3])


def test_an_output_folder_that_cannot_be_written_stops_the_script_in_one_line(voc, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["segmentation", f"--data={voc}", f"--out={tmp_path}/file/out"])
    with pytest.raises(SystemExit) as ended:
        enter(Config, run, None)
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith(f"\nerror: {tmp_path}/file/out: Not a directory\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps: expected at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size: expected at least 1, got -1"),
        ({"checkpoint_every": 0}, "--checkpoint-every: expected at least 1, got 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected a positive number, got nan"),
        ({"seed": -1}, "--seed: expected an integer in"),
        ({"crop": 8}, "--crop: expected 32 to 2048 pixels, got 8"),
        ({"crop": 100_000}, "--crop: expected 32 to 2048 pixels, got 100000"),
        ({"classes": 256}, "--classes: expected an integer from 2 to 255, got 256"),
        ({"classes": 10}, "--classes: the digits have 11 with their background, got 10"),
        (
            {"void": (0,)},
            "--values, --void and --colours: expected with a folder, --data DIR: the digits have no masks",
        ),
        ({"data": "x", "void": (256,)}, "--void: expected integers from 0 to 255, as masks hold, got 256"),
        ({"data": "x", "void": (1, 1)}, "--void: expected each value once, got 1 and 1"),
        ({"data": "x", "values": (1,)}, "--values: expected 2 to 255 values, got 1"),
        ({"data": "x", "values": (1, 2), "classes": 3}, "--classes: --values gives the values of 2, got 3"),
        ({"learning_rate": 1e30}, "--learning-rate 1e+30: expected a finite loss, got nan at step"),
        (
            {"learning_rate": 3.4028e38, "steps": 1},
            "--learning-rate 3.4028e+38: expected finite parameters, got others after step 1",
        ),
    ],
)
def test_bad_options_are_one_line(tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        run(config(tmp_path, **options))
    assert message in str(caught.value)


def test_more_steps_are_refused_and_begun_with_the_parameters_of_the_run(voc, whole, tmp_path):
    """The last steps are trained at a learning rate of 0, so only the parameters can be used for longer training."""
    _, out = whole
    more = config(out, data=str(voc), resume=True, steps=9)
    with pytest.raises(InputError) as caught:
        run(more)
    assert str(caught.value) == (
        f"--steps: expected 7, over which the learning rate of {out} falls to 0, got 9: resume with the run's own "
        f"options; to train longer, start another run from its parameters when it is finished, --start {out} --out DIR"
    )
    options = config(tmp_path / "more", data=str(voc), start=out)
    run(options)
    first, last = (pd.read_csv(path / "metrics.csv")["loss"] for path in (options.out, out))
    assert first.iloc[0] < last.iloc[0]
    with pytest.raises(InputError, match=r"--start: .*more/checkpoints was written with .*, got None: --resume needs"):
        run(config(options.out, data=str(voc), resume=True))
    with pytest.raises(InputError, match=r"--start: expected a run on photographs with 4 classes, got .*, of 3"):
        run(config(tmp_path / "other", data=str(voc), start=out, classes=4))
    with pytest.raises(InputError, match=r"other: expected a finished run, which holds summary.json and network.json"):
        run(config(tmp_path / "third", data=str(voc), start=tmp_path / "other"))


def test_a_run_of_an_earlier_version_is_not_resumed(voc, tmp_path, monkeypatch):
    options = config(tmp_path, data=str(voc))
    stopped_at(monkeypatch, options, 3)
    record = read_record(tmp_path / "checkpoints", 2)
    del record["options"]["void"]
    save(tmp_path / "checkpoints", Checkpoint(3, {}, record))
    with pytest.raises(InputError, match=r": expected a run of this version, got one of an earlier version, which"):
        run(dataclasses.replace(options, resume=True))


@pytest.mark.parametrize("predicting", [False, True])
def test_an_interruption_before_the_first_checkpoint_says_that_resume_begins_again(
    voc, tmp_path, monkeypatch, capfd, predicting
):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_runs, "append", interrupt)
    monkeypatch.setattr(segmentation, "read_trained", interrupt)
    options = ["--predict=x.jpg"] if predicting else [f"--data={voc}", "--batch-size=2", "--crop=32"]
    monkeypatch.setattr(sys, "argv", ["segmentation", *options, f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        enter(Config, run, None)
    assert ended.value.code == 130
    line = (
        "interrupted" if predicting else "interrupted before the first checkpoint, of step 200; --resume begins again"
    )
    assert capfd.readouterr().err.splitlines()[-1] == line


def test_a_run_predicts_photographs(whole, voc, tmp_path, capsys):
    _, out = whole
    exif = turned(6)
    Image.fromarray(RNG.integers(0, 256, (50, 41, 3), np.uint8)).save(tmp_path / "new.jpg", exif=exif)
    paths = (voc / "JPEGImages/0.jpg", tmp_path / "new.jpg")
    run(Config(predict=paths, out=out))
    trained = read_trained(out)
    lines = capsys.readouterr().out.splitlines()
    for path, line in zip(paths, lines, strict=True):
        image = read_photograph(path)
        classes = trained.classes(image)
        written = read_mask(out / f"predictions/{path.stem}_mask.png")
        np.testing.assert_array_equal(written, classes)
        shares = {f"{n} {np.mean(classes == n):.1%}" for n in np.unique(classes)}
        said, _, where = line.removeprefix(f"{path}: ").partition("; see ")
        assert set(said.split(", ")) == shares
        assert where == f"{out}/predictions/{path.stem}_mask.png and {path.stem}_overlay.png"
        with Image.open(out / f"predictions/{path.stem}_overlay.png") as overlay:
            blend = (image.astype(int) + voc_palette()[classes]) / 2
            assert np.abs(np.asarray(overlay) - blend).max() <= 1
    with np.load(out / "checkpoints/7/state.npz") as state:  # as the docs have it
        np.testing.assert_array_equal(state["0/score/0"], trained.params["score"][0])


def test_predicted_masks_have_the_values_and_colours_of_the_training_masks(tmp_path, masks_of):
    folder = masks_of(0, 255)
    run(config(tmp_path / "out", data=str(folder), values=(0, 255)))
    photograph = folder / "JPEGImages/0.png"
    run(Config(predict=(photograph,), out=tmp_path / "out"))
    assert set(np.unique(read_mask(tmp_path / "out/predictions/0_mask.png"))) <= {0, 255}
    options = write_coloured(tmp_path / "second", BLACK, RED, GREEN, table="0 0 0 void\n128 0 0\n0 128 0\n")
    run(config(tmp_path / "coloured", **options))
    run(Config(predict=(photograph,), out=tmp_path / "coloured"))
    with Image.open(tmp_path / "coloured/predictions/0_mask.png") as mask:
        assert {colour for _, colour in mask.convert("RGB").getcolors()} <= {RED, GREEN}


def test_predictions_of_one_name_or_without_a_run_are_one_line(whole, tmp_path):
    _, out = whole
    with pytest.raises(InputError, match="--predict: expected photographs of different names, got 2 of the name x"):
        run(Config(predict=(pathlib.Path("a/x.jpg"), pathlib.Path("b/x.png")), out=out))
    with pytest.raises(InputError, match=r"x.jpg: no such file$"):
        run(Config(predict=(tmp_path / "x.jpg",), out=out))
    (tmp_path / "photographs").mkdir()
    with pytest.raises(InputError, match=r"photographs: expected an image, got a folder$"):
        run(Config(predict=(tmp_path / "photographs",), out=out))
    with pytest.raises(InputError, match=r": expected a finished run, which holds summary.json and network.json"):
        run(Config(predict=(tmp_path / "x.jpg",), out=tmp_path))


# Folders.


@pytest.fixture
def broken(voc, tmp_path):
    """A copy of the folder to break."""
    for path in voc.rglob("*.*"):
        copy = tmp_path / "voc" / path.relative_to(voc)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return tmp_path / "voc"


MASK, IMAGE, LIST = "SegmentationClass/1.png", "JPEGImages/0.jpg", "ImageSets/Segmentation/train.txt"


def save_mask(pixels):
    return lambda path: Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        (MASK, save_mask(np.zeros((40, 64), np.uint8)), "JPEGImages/1.png, 40×64, got 64×40"),
        (MASK, save_mask(np.full((64, 40), 200, np.uint8)), "expected labels below --classes 3 or 255 (void), got 200"),
        (MASK, save_mask(np.zeros((64, 40, 3), np.uint8)), "expected a palette or 8-bit greyscale mask, got 3 channels of the colours 0 0 0: pass --colours FILE with a line 'R G B name' for each"),
        (MASK, save_mask(np.zeros((64, 40), np.uint16)), "expected a palette or 8-bit greyscale mask, got Pillow's mode I;16: save it in mode L, 8 bits per pixel"),
        (MASK, lambda path: path.unlink(), "no such file, listed in {folder}/ImageSets/Segmentation/train.txt, line 2"),
        (MASK, lambda path: os.truncate(path, 600), "cannot read the image: "),
        (IMAGE, lambda path: path.unlink(), "no such file, listed in {folder}/ImageSets/Segmentation/train.txt, line 1"),
        (IMAGE, lambda path: os.truncate(path, path.stat().st_size // 2), "cannot read the image: "),
        (IMAGE, lambda path: path.write_text("no image"), "cannot read the image: "),
        (LIST, lambda path: path.write_text(" \n"), "expected at least one name, got an empty list"),
        (LIST, lambda path: path.write_bytes(b"\xff\xfe0"), "expected text, one name per line"),
        (LIST.replace("train", "val"), lambda path: path.write_text(""), "expected at least one name, got an empty list"),
    ],
)  # fmt: skip
def test_bad_folders_are_one_line_naming_the_file(broken, tmp_path, file, spoil, message):
    spoil(broken / file)
    with pytest.raises(InputError) as caught:
        run(config(tmp_path / "out", data=str(broken), classes=3))
    assert str(caught.value).startswith(f"{broken / file}: ")
    assert message.format(folder=broken) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (None, "{0}: no such folder, given by --data"),
        ([], "{0}: expected {1}; got nothing"),
        (["a/x.jpg", "b.png", ".hidden"], "{0}: expected {1}; got a/, b.png"),
        ([f"{n}.png" for n in range(9)], "{0}: expected {1}; got 0.png, 1.png, 2.png, 3.png, 4.png, 5.png and 3 more"),
        (["train.txt"], "{0}/train.txt: expected at least one name, got an empty list"),
        (["val.txt"], "{0}/train.txt: no such list; train.txt and val.txt say what to train on and what to hold out"),
        (["images/x.png", "masks/.DS_Store"], "{0}/images: expected a file of the same name in {0}/masks for each, got none for x"),
        (["images/x.png", "masks/x.png", "masks/y.gif"], "{0}/masks: expected a file of the same name in {0}/images for each, got none for y"),
        (["images/x.png", "masks/x.png"], "{0}/images: expected two photographs or more, one to be held out, got 1"),
        (["images/x.txt", "labels/x.png"], "{0}/labels: expected a file of the same name in {0}/images for each, got none for x"),
    ],
)  # fmt: skip
def test_folders_of_no_layout_are_one_line(tmp_path, present, message):
    folder = tmp_path / "data"
    for name in [] if present is None else ["", *present]:
        path = folder / name
        (path if name == "" else path.parent).mkdir(parents=True, exist_ok=True)
        if name:
            path.write_text("")
    with pytest.raises(InputError) as caught:
        read_folder(folder)
    assert str(caught.value) == message.format(folder, EXPECTED)


def lay_out(folder, files, lists):
    """Write photographs and masks with these paths, each mask with two classes; a photograph's grey level is its number."""
    for n, (image, mask) in enumerate(files):
        for path, pixels in ((image, np.full((20, 30, 3), n, np.uint8)), (mask, np.eye(20, 30, dtype=np.uint8))):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / path)
    for path, text in lists.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def numbers(photographs):
    return [photographs[n].image[0, 0, 0] for n in range(len(photographs))]


@pytest.mark.parametrize(
    ("files", "lists"),
    [
        ([("JPEGImages/a b.JPG", "SegmentationClass/a b.PNG"), ("JPEGImages/1.jpeg", "SegmentationClass/1.png")],
         {"ImageSets/Segmentation/train.txt": "\ufeffa b\n", "ImageSets/Segmentation/val.txt": "1.jpeg"}),
        ([("images/a.png", "labels/a.tif"), ("images/b/1.png", "labels/b/1.gif")],
         {"train.txt": "a\r\n", "val.txt": "\ufeffb/1.png\n"}),
        ([("train/a.png", "trainannot/a.png"), ("val/1 2.JPG", "valannot/1 2.png")],
         {"train.txt": "\ufeff/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n",
          "val.txt": "\nval/1 2.JPG\tC:\\data\\valannot\\1 2.png\n"}),
    ],
)  # fmt: skip
def test_lists_name_photographs_or_pairs_of_paths(tmp_path, files, lists):
    lay_out(tmp_path, files, lists)
    train, test, names = read_folder(tmp_path)
    assert (numbers(train), numbers(test)) == ([0], [1])
    assert names == ("0", "1")


def test_a_pair_that_is_missing_is_one_line(tmp_path):
    lay_out(tmp_path, [("a.png", "b.png")], {"train.txt": "a.png b.png\n", "val.txt": "\na.png x/c.png\n"})
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path}/x/c.png: no such file, listed in {tmp_path}/val.txt, line 2"


@pytest.mark.parametrize("masks", ["masks", "labels"])
def test_without_lists_a_fifth_is_held_out_by_the_seed(tmp_path, capsys, masks):
    lay_out(tmp_path, [(f"images/{n:02}.png", f"{masks}/{n:02}.png") for n in range(11)], {})
    drawn = [read_folder(tmp_path, seed=seed) for seed in (0, 0, 1)]
    assert capsys.readouterr().out.splitlines()[0] == "9 photographs to train on, 2 held out, drawn by --seed 0"
    first, again, other = ((numbers(train), numbers(test)) for train, test, _ in drawn)
    assert first == again != other
    assert sorted(first[0] + first[1]) == sorted(other[0] + other[1]) == list(range(11))


def test_the_layouts_stand_in_the_help_and_in_the_docs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["segmentation", "--help"])
    with pytest.raises(SystemExit):
        enter(Config, run, segmentation.__doc__)
    page = (pathlib.Path(__file__).parents[1] / "docs/experiments.md").read_text()
    for text in (capsys.readouterr().out, page):
        for name in (*IMAGES, *MASKS, "ImageSets/Segmentation/train.txt", '"photograph.png mask.png"', "classes.txt"):
            assert name in text


def test_masks_with_only_void_are_refused(broken):
    for n in (3, 4):
        path = broken / f"SegmentationClass/{n}.png"
        Image.fromarray(np.full_like(read_mask(path), VOID)).save(path)
    with pytest.raises(InputError, match=r"val.txt: expected a labelled pixel in its masks, got 255 everywhere"):
        read_folder(broken)


def test_names_come_from_the_folder_or_from_voc(broken):
    assert class_names(broken, 3) == ("0", "1", "2")
    assert class_names(broken, 21)[15] == "person"
    (broken / "classes.txt").write_text("sky\nroad\ntree\n")
    assert class_names(broken, 3) == ("sky", "road", "tree")
    with pytest.raises(InputError, match=r"classes.txt: expected the names of 4 classes, one per line, got 3"):
        class_names(broken, 4)
    (broken / "classes.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"classes.txt: expected text, one name per line"):
        class_names(broken, 3)


def test_the_palette_equals_the_one_of_voc():
    colors = voc_palette()
    assert colors[[0, 1, 2, 15, VOID]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]
    ]  # fmt: skip


def test_streets_are_a_folder_of_eleven_named_classes(tmp_path):
    streets.run(streets.Config(train=6, val=2, out=tmp_path))
    train, test, names = read_folder(tmp_path)
    assert (len(train), len(test)) == (6, 2)
    assert names == tuple(streets.NAMES)
    assert train[0].image.shape == (180, 240, 3)


def test_classes_are_found_or_given(voc):
    assert read_folder(voc).names == ("0", "1", "2")
    assert len(read_folder(voc, classes=21).names) == 21


# Codings.


def write_pair(folder, name, mask, image=None):
    """A photograph, grey where none is given, and its mask."""
    for part in ("JPEGImages", "SegmentationClass"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    (image or Image.new("RGB", mask.size, "grey")).save(folder / f"JPEGImages/{name}.png")
    mask.save(folder / f"SegmentationClass/{name}.png")


def write_lists(folder, train=("0",), val=("0",)):
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    for part, names in (("train", train), ("val", val)):
        (folder / f"ImageSets/Segmentation/{part}.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def masks_of(tmp_path):
    """A folder of one photograph, whose mask has a column of each value."""

    def write(*values):
        write_pair(tmp_path / "data", "0", np.tile(np.repeat(np.uint8(values), 8), (40, 1)))
        write_lists(tmp_path / "data")
        return tmp_path / "data"

    return write


TRAIN = "ImageSets/Segmentation/train.txt: its masks hold"


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ((0, 255), {"classes": 2}, f"{TRAIN} the values 0 (class 0) and 255 (void), fewer than two classes: where each value is a class, pass --values 0 255"),
        ((0, 255), {}, f"{TRAIN} the values 0 (class 0) and 255 (void), fewer than two classes: where each value is a class, pass --values 0 255"),
        ((0, 1), {"void": (0,)}, f"{TRAIN} the values 0 (void) and 1 (class 0), fewer than two classes: where each value is a class, pass --values 0 1"),
        ((3,), {}, f"{TRAIN} the value 3 (class 3), fewer than two classes: label everything that is not the class, too"),
        ((0, 1, 9), {"values": (0, 1)}, "0.png: expected --values 0 1 or 255 (void), got 9"),
        ((0, 255), {"values": (0, 1), "void": (7,)}, "0.png: expected --values 0 1 or 7 (void), got 255"),
        ((0, 9), {"values": (0, 255)}, "0.png: expected --values 0 255, got 9"),
        ((0, 1, 2, 3), {"classes": 2, "void": (0,)}, "0.png: expected labels below --classes 2 or 0 (void), got 3, which is class 2 without 0"),
    ],
)  # fmt: skip
def test_masks_with_one_class_are_one_line(tmp_path, masks_of, values, options, message):
    with pytest.raises(InputError) as caught:
        run(config(tmp_path / "out", data=str(masks_of(*values)), **options))
    assert str(caught.value).endswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "options", "labels", "names"),
    [
        ((0, 255), {"values": (0, 255)}, (0, 1), ("0", "255")),  # a student's: black and white
        ((0, 1, 10, 11), {"void": (11,)}, (0, 1, 10, VOID), tuple(map(str, range(11)))),  # SegNet's CamVid
        ((0, 1, 2, 150), {"void": (0,)}, (VOID, 0, 1, 149), tuple(map(str, range(1, 151)))),  # ADE20K
        ((0, 7, 9, 8), {"void": (0, 9), "values": (8, 7)}, (VOID, 1, VOID, 0), ("8", "7")),
    ],
)
def test_values_are_classes_or_void_as_the_options_say(masks_of, values, options, labels, names):
    train, _, found = read_folder(masks_of(*values), Coding(**options))
    np.testing.assert_array_equal(train[0].labels[0, ::8], labels)
    assert found == names


def test_black_and_white_masks_train_both_classes(tmp_path, masks_of):
    summary = run(config(tmp_path / "out", data=str(masks_of(0, 255)), values=(0, 255)))
    assert summary["valid_pixels"] == 640
    assert len(summary["per_class_iou"]) == 2
    (tmp_path / "out/summary.json").unlink()
    other = config(tmp_path / "out", data=str(tmp_path / "data"), values=(255, 0), resume=True)
    with pytest.raises(InputError, match=r"--values: .*checkpoints was written with \[0, 255\], got \[255, 0\]"):
        run(other)


@pytest.mark.parametrize(
    ("values", "options", "line"),
    [
        ((0, 147, 220), {}, "3 of 221 classes occur: 0, 147, 220 (--values 0 147 220 keeps these alone); 0.0% of the pixels are void (255)"),
        ((0, 15, 20), {}, "3 of 21 classes occur: background, person, monitor; 0.0% of the pixels are void (255)"),
        ((0, 1, 3, 255), {"classes": 4}, "3 of 4 classes occur: 0, 1, 3; 25.0% of the pixels are void (255)"),
        ((0, 3, 255, 9), {"values": (0, 3, 4), "void": (255, 9)}, "2 of 3 classes occur: 0, 3; 50.0% of the pixels are void (9 and 255)"),
        ((0, 1, 3), {"void": (0,)}, "2 of 3 classes occur: 1, 3; 33.3% of the pixels are void (0)"),
        ((0, 255), {"values": (0, 255)}, "2 of 2 classes occur; no value is void"),
        ((0, 1, 2), {}, "3 of 3 classes occur; 0.0% of the pixels are void (255)"),
    ],
)  # fmt: skip
def test_classes_that_never_occur_are_listed(masks_of, capsys, values, options, line):
    classes = options.pop("classes", None)
    read_folder(masks_of(*values), Coding(**options), classes)
    assert capsys.readouterr().out == f"{line}\n"


def test_classes_only_in_held_out_images_are_listed(masks_of, tmp_path, capsys):
    masks_of(0, 1)
    write_pair(tmp_path / "data", "1", np.tile(np.uint8([0, 1, 2]), (3, 1)))
    (tmp_path / "data/ImageSets/Segmentation/val.txt").write_text("1\n")
    read_folder(tmp_path / "data")
    assert capsys.readouterr().out.endswith("\nheld out, but never trained on: 2\n")


# Colours.

BLACK, RED, GREEN, BLUE = (0, 0, 0), (128, 0, 0), (0, 128, 0), (0, 0, 128)


def write_coloured(folder, *colours, table, mode="RGB"):
    """As in `masks_of`, with the table of colours next to it."""
    columns = np.repeat(np.uint8(colours), 8, 0)
    write_pair(
        folder / "data",
        "0",
        Image.fromarray(np.tile(columns, (40, 1, 1))).convert(mode, palette=Image.Palette.ADAPTIVE),
    )
    write_lists(folder / "data")
    (folder / "colours.txt").write_text(table)
    return {"data": str(folder / "data"), "colours": folder / "colours.txt"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_coloured_masks_are_read_by_their_table(tmp_path, mode):
    table = "\ufeff128 0 0 red thing\n\n0 0 0\tVoid\n0 128 0\n"
    options = write_coloured(tmp_path, BLACK, RED, GREEN, table=table, mode=mode)
    coding = read_colours(options["colours"])
    train, _, names = read_folder(tmp_path / "data", coding)
    np.testing.assert_array_equal(train[0].labels[0, ::8], [VOID, 0, 1])
    assert names == ("red thing", "0 128 0")
    assert palette_of(coding)[[VOID, 0, 1]].tolist() == [list(BLACK), list(RED), list(GREEN)]
    assert len(run(config(tmp_path / "out", **options))["per_class_iou"]) == 2


@pytest.mark.parametrize(
    ("colours", "table", "message"),
    [
        ((BLACK, BLUE), "0 0 0 a\n0 128 0 b\n", "0.png: expected only the colours of --colours, got 0 0 128 in row 0, column 8, and 320 such pixels"),
        ((BLACK, BLUE), "0 0 0 void\n0 0 128 b\n1 1 1 c\n", "train.txt: its masks hold the colours 0 0 0 (void) and 0 0 128 (class 0), fewer than two classes: label everything that is not the class, too"),
        ((BLACK,), "0 0 0\n0 0 300 b\n", "colours.txt, line 2: expected 'R G B name', three integers from 0 to 255, got '0 0 300 b'"),
        ((BLACK,), "0 0\n", "colours.txt, line 1: expected 'R G B name', three integers from 0 to 255, got '0 0'"),
        ((BLACK,), "0 0 0\n0 0 0 b\n", "colours.txt, line 2: expected each colour once, got 0 0 0 again"),
        ((BLACK,), "0 0 0\n", "colours.txt: expected the colours of 2 to 255 classes, one per line, got 1"),
    ],
)  # fmt: skip
def test_bad_colours_are_one_line(tmp_path, colours, table, message):
    options = write_coloured(tmp_path, *colours, table=table)
    with pytest.raises(InputError) as caught:
        run(config(tmp_path / "out", **options))
    assert str(caught.value).endswith(message)


def test_colours_exclude_other_codings(tmp_path):
    options = write_coloured(tmp_path, BLACK, RED, table="0 0 0\n128 0 0\n")
    with pytest.raises(InputError, match="--colours: expected without --values and --void: its lines say what is void"):
        run(config(tmp_path / "out", **options, void=(0,)))
    with pytest.raises(InputError, match="--classes: --colours has the colours of 2, got 3"):
        run(config(tmp_path / "out", **options, classes=3))


# Files.


def turned(orientation):
    """The EXIF orientation of a camera held in this way."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)],
)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_photographs_are_upright(tmp_path, orientation, turn, ending):
    """As every viewer shows them: the stored pixels, rotated by EXIF."""
    stored = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8), 16).reshape(16, 24)).convert("RGB")
    stored.save(tmp_path / f"0.{ending}", exif=turned(orientation), quality=100, subsampling=0)
    seen = stored if turn is None else stored.transpose(turn)
    found = read_photograph(tmp_path / f"0.{ending}")
    assert found.shape == (seen.height, seen.width, 3)
    assert np.abs(found.astype(int) - np.asarray(seen)).max() < 16
    np.testing.assert_allclose(found[[0, -1]].mean((1, 2)), np.asarray(seen)[[0, -1]].mean((1, 2)), atol=5)


def test_a_mask_that_is_not_rotated_like_its_photograph_is_one_line(tmp_path):
    stored = Image.new("RGB", (40, 32))
    write_pair(tmp_path, "0", Image.fromarray(RNG.integers(0, 2, (32, 40), np.uint8)))
    stored.save(tmp_path / "JPEGImages/0.png", exif=turned(6))
    write_lists(tmp_path)
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/SegmentationClass/0.png: expected the size of {tmp_path}/JPEGImages/0.png, 32×40, got 40×32: "
        "the photograph's EXIF orientation rotates it, so rotate the mask too"
    )


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_photographs_of_16_bits_keep_the_upper_8(tmp_path, ending):
    stored = RNG.integers(0, 2**16, (5, 7), np.uint16)
    Image.fromarray(stored).save(tmp_path / f"0.{ending}")
    np.testing.assert_array_equal(read_photograph(tmp_path / f"0.{ending}"), np.stack([stored // 256] * 3, -1))


def test_photographs_of_32_bits_are_one_line(tmp_path):
    Image.fromarray(np.ones((5, 7), np.float32)).save(tmp_path / "0.tif")
    with pytest.raises(InputError, match=r"0.tif: expected 8 or 16 bits per channel, got 32: save the photograph with"):
        read_photograph(tmp_path / "0.tif")


def write_grey(path, values, bits):
    """A PNG written by its specification, because Pillow would scale the labels when writing."""
    height, width = values.shape
    shifts = np.arange(bits - 1, -1, -1)
    rows = np.packbits((values[..., None] >> shifts & 1).reshape(height, -1), 1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    content = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(content))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_hold_their_labels(tmp_path, bits):
    values = RNG.integers(0, 2**bits, (9, 13), np.uint8)
    write_grey(tmp_path / "0.png", values, bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "0.png"), values)
    palette = Image.fromarray(values)
    palette.putpalette([*range(256)] * 3)
    palette.save(tmp_path / "1.png", bits=bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "1.png"), values)


@pytest.mark.parametrize(("form", "ending"), [("JPEG", "jpg"), ("JPEG", "png"), ("WEBP", "webp")])
def test_lossy_masks_are_one_line(tmp_path, form, ending):
    Image.fromarray(np.zeros((9, 13), np.uint8)).save(tmp_path / f"0.{ending}", form)
    with pytest.raises(InputError) as caught:
        read_mask(tmp_path / f"0.{ending}")
    assert str(caught.value) == (
        f"{tmp_path}/0.{ending}: expected a mask in a lossless format such as PNG, got {form}, which changes "
        "the values: export the mask again"
    )
