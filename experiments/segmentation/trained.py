"""Read a trained network, to label the pixels of new photographs.

trained = read_trained(Path("out/segmentation"))
classes = trained.classes(read_photograph(Path("new.jpg")))
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from experiments._checkpoints import latest_whole, read_state
from experiments._door import InputError, make_folder, write_json
from experiments.segmentation.files import read_photograph
from experiments.segmentation.network import init_network
from experiments.segmentation.pictures import Palette
from experiments.segmentation.training import Recipe, predict_whole

NETWORK = "network.json"


class Trained(NamedTuple):
    """The parameters of a network, and its classes' names, mask values and colours."""

    params: Any
    recipe: Recipe
    names: tuple[str, ...]
    values: UInt8[np.ndarray, " classes"]
    """The mask value of each class."""
    palette: Palette
    """The colour of each mask value."""

    def classes(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        return predict_whole(self.params, image, self.recipe)


def write_trained(out: Path, trained: Trained, widths: Sequence[int]) -> None:
    """Write everything except the parameters, which are in the last checkpoint."""
    arrays = {
        "mean": trained.recipe.mean,
        "deviation": trained.recipe.deviation,
        "values": trained.values,
        "palette": trained.palette,
    }
    lists = {name: array.tolist() for name, array in arrays.items()}
    write_json(out / NETWORK, {"names": list(trained.names), "widths": list(widths), **lists})


def read_trained(out: Path) -> Trained:
    path = out / NETWORK
    if not (out / "summary.json").is_file() or not path.is_file():
        raise InputError(f"{out}: expected a finished run, which holds summary.json and {NETWORK}")
    step = latest_whole(out / "checkpoints")
    if step is None:
        raise InputError(f"{out / 'checkpoints'}: expected a checkpoint of the last step, got none")
    known = json.loads(path.read_text())
    like = jax.eval_shape(lambda key: init_network(key, len(known["names"]), tuple(known["widths"])), jax.random.key(0))
    [params] = read_state(out / "checkpoints", step, (like,))
    mean, deviation = (np.array(known[name], np.float32) for name in ("mean", "deviation"))
    values, palette = (np.array(known[name], np.uint8) for name in ("values", "palette"))
    return Trained(params, Recipe(mean, deviation, None), tuple(known["names"]), values, palette)


def write_predictions(trained: Trained, photographs: Sequence[Path], folder: Path) -> None:
    """For each photograph write a mask with the training masks' values, and an overlay to look at."""
    for name, count in Counter(path.stem for path in photographs).items():
        if count > 1:
            raise InputError(f"--predict: expected photographs of different names, got {count} of the name {name}")
    images = {path: read_photograph(path) for path in photographs}
    make_folder(folder)
    for path, image in images.items():
        classes = trained.classes(image)
        mask = Image.fromarray(trained.values[classes])
        mask.putpalette(trained.palette.tobytes())
        overlay = Image.blend(Image.fromarray(image), mask.convert("RGB"), 0.5)
        mask.save(folder / f"{path.stem}_mask.png")
        overlay.save(folder / f"{path.stem}_overlay.png")
        shares = np.bincount(classes.ravel(), minlength=len(trained.names)) / classes.size
        found = [f"{trained.names[n]} {shares[n]:.1%}" for n in np.argsort(-shares) if shares[n]]
        print(f"{path}: {', '.join(found)}; see {folder / path.stem}_mask.png and {path.stem}_overlay.png")
