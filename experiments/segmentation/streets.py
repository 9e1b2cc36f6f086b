"""How well does the segmentation work on streets, if you have no photographs of streets?

python -m experiments.segmentation.streets --out out/streets

Draws a folder in PASCAL VOC layout: streets in perspective, of eleven classes, in shadow, haze and noise, with surfaces
cut from the two photographs that scikit-learn ships. They are not photographs: scores on them compare recipes, but
do not predict scores on real streets.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_sample_images
from tqdm import trange

from experiments._door import check_counts, check_seed, enter, make_folder
from experiments.segmentation.scenes import VOID, Pair

NAMES = "sky building pole road pavement tree sign fence car pedestrian cyclist".split()  # noqa: SIM905
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, CYCLIST = range(11)
# For each class the mean and deviation of its colour, the contrast of its surface relative to the photograph, the
# photograph (the temple or the dahlia), and the part of it: left, top, right and bottom.
SURFACES = {
    SKY: ((190, 205, 220), 10, 0.3, 0, (340, 0, 640, 190)),
    BUILDING: ((130, 115, 105), 18, 0.5, 0, (80, 110, 350, 340)),
    POLE: ((110, 110, 110), 18, 0.1, 1, (0, 0, 160, 427)),
    ROAD: ((95, 95, 98), 8, 0.4, 0, (390, 220, 560, 290)),
    PAVEMENT: ((145, 132, 118), 9, 0.25, 1, (180, 90, 440, 350)),
    TREE: ((75, 95, 60), 10, 0.7, 0, (330, 290, 640, 427)),
    SIGN: ((150, 110, 90), 45, 0.1, 1, (180, 90, 440, 350)),
    FENCE: ((115, 105, 95), 15, 0.8, 0, (80, 110, 350, 340)),
    CAR: ((115, 115, 120), 40, 0.3, 1, (450, 0, 640, 427)),
    PEDESTRIAN: ((95, 85, 85), 30, 0.5, 1, (180, 90, 440, 350)),
    CYCLIST: ((100, 90, 85), 30, 0.5, 1, (180, 90, 440, 350)),
}


@dataclass(frozen=True)
class Config:
    """Options of the streets."""

    train: int = 60
    """Images to train on."""
    val: int = 20
    """Images to hold out."""
    seed: int = 0
    """Seed for the images."""
    out: Path = Path("out/streets")
    """Folder for the images."""


class Painter:
    """An image and its labels, painted from back to front."""

    def __init__(self, rng: np.random.Generator, photographs: list[np.ndarray], width: int, height: int):
        self.rng, self.photographs, self.width, self.height = rng, photographs, width, height
        self.image = np.zeros((height, width, 3))
        self.labels = np.full((height, width), VOID, np.uint8)

    def surface(self, label: int) -> Float[np.ndarray, "h w 3"]:
        """A piece of texture that looks like the class, at a random scale, with colours shifted towards the class's."""
        mean, deviation, contrast, which, (left, top, right, bottom) = SURFACES[label]
        width, height = (self.rng.uniform(0.4, 1) * length for length in (right - left, bottom - top))
        left, top = self.rng.uniform(left, right - width), self.rng.uniform(top, bottom - height)
        piece = (left, top, left + width, top + height)
        resized = Image.fromarray(self.photographs[which]).resize((self.width, self.height), box=piece)
        texture = np.asarray(resized, float)
        color = np.array(mean) + self.rng.normal(0, deviation) + self.rng.normal(0, deviation / 3, 3)
        return color + contrast * (texture - texture.mean((0, 1)))

    def fill(self, label: int, mask: Bool[np.ndarray, "h w"]) -> None:
        self.image[mask] = self.surface(label)[mask]
        self.labels[mask] = label

    def shape(self, kind: str, points, **options) -> Bool[np.ndarray, "h w"]:
        canvas = Image.new("1", (self.width, self.height))
        getattr(ImageDraw.Draw(canvas), kind)(points, fill=1, **options)
        return np.asarray(canvas)

    def box(self, x: float, y: float, width: float, height: float, kind: str = "rectangle") -> Bool[np.ndarray, "h w"]:
        """An object that stands on (x, y)."""
        return self.shape(kind, [x - width / 2, y - height, x + width / 2, y])


def draw_street(rng: np.random.Generator, photographs: list[np.ndarray], width: int = 240, height: int = 180) -> Pair:
    painter = Painter(rng, photographs, width, height)
    box, fill, shape = painter.box, painter.fill, painter.shape
    horizon, middle = height * rng.uniform(0.38, 0.55), width * rng.uniform(0.35, 0.65)
    fill(SKY, np.ones((height, width), bool))
    fill(PAVEMENT, box(width / 2, height, width + 2, height - horizon))
    left, right = width * rng.uniform(-0.4, 0.15), width * rng.uniform(0.85, 1.4)
    fill(ROAD, shape("polygon", [(middle - 3, horizon), (middle + 3, horizon), (right, height), (left, height)]))

    def ground(y: float) -> tuple[float, float]:
        """The edges of the road at a height in the image."""
        near = (y - horizon) / (height - horizon)
        return middle + near * (left - middle), middle + near * (right - middle)

    for side in (-1, 1):
        edge = width * (side + 1) / 2
        for far in np.sort(rng.uniform(0.1, 1, rng.integers(2, 5)))[::-1]:  # from the vanishing point to the edge
            x = edge + far * (middle - edge)
            reach = (1 - far) * 0.5 * (height - horizon) + 3  # below the horizon
            high = reach * rng.uniform(2, 7)
            label = BUILDING if rng.random() < 0.7 else TREE
            x0, x1 = sorted((x, edge - side * -30))
            if label == BUILDING:
                fill(BUILDING, shape("rectangle", [x0, horizon - high, x1, horizon + reach]))
                if rng.random() < 0.4:
                    fill(FENCE, shape("rectangle", [x0, horizon - reach * 0.2, x1, horizon + reach]))
            else:
                fill(TREE, box(x, horizon + reach, 2 + reach / 6, high))
                for _ in range(8):
                    dx, dy = rng.normal(0, high / 5, 2)
                    fill(TREE, box(x + dx, horizon - high / 3 + dy, high / 2.5, high / 2.5, "ellipse"))
    depths = np.sort(rng.beta(1, 3, rng.integers(6, 13)))  # near objects hide far ones
    for near in depths:
        y = horizon + 3 + near * (height - horizon) * 0.9
        size = 4 + near * height * 0.9  # two metres high
        first, last = ground(y)
        beside = rng.choice([first - size * rng.uniform(0.1, 1), last + size * rng.uniform(0.1, 1)])
        kind = rng.choice([CAR, CAR, CAR, PEDESTRIAN, CYCLIST, POLE, POLE, SIGN])
        if kind == CAR:
            x, w = rng.uniform(first, last), size * rng.uniform(0.8, 1.6)
            fill(CAR, box(x, y, w, size * 0.45) | box(x, y - size * 0.4, w * 0.7, size * 0.3))
            glass = box(x, y - size * 0.42, w * 0.55, size * 0.22)
            painter.image[glass] = painter.image[glass] * 0.3 + 30
            dark = box(x - w * 0.33, y, w * 0.18, size * 0.18) | box(x + w * 0.33, y, w * 0.18, size * 0.18)
            painter.image[dark] = 30
        elif kind == PEDESTRIAN:
            fill(PEDESTRIAN, box(beside, y, size * 0.22, size * 0.75))
            fill(PEDESTRIAN, box(beside, y - size * 0.7, size * 0.16, size * 0.2, "ellipse"))
        elif kind == CYCLIST:
            x = rng.uniform(first, last)
            wheels = [box(x + dx * size, y, size * 0.35, size * 0.35, "ellipse") for dx in (-0.25, 0.25)]
            fill(CYCLIST, wheels[0] | wheels[1] | box(x, y - size * 0.3, size * 0.2, size * 0.5))
            fill(CYCLIST, box(x, y - size * 0.75, size * 0.16, size * 0.2, "ellipse"))
            for wheel in wheels:
                painter.image[wheel] = painter.image[wheel] * 0.4 + 20
        else:
            tall = size * rng.uniform(1.2, 3)
            fill(POLE, box(beside, y, 1 + size * 0.015, tall))
            if kind == SIGN:
                form = rng.choice(["ellipse", "rectangle"])
                fill(SIGN, box(beside, y - tall * 0.8, size * rng.uniform(0.1, 0.3), size * 0.2, str(form)))
    return photograph(rng, painter)


def photograph(rng: np.random.Generator, painter: Painter) -> Pair:
    """Add shadows, light, haze and noise, and blur a little."""
    height, width = painter.labels.shape
    image = painter.image
    for _ in range(rng.integers(0, 4)):
        corners = [(rng.uniform(0, width), rng.uniform(height * 0.4, height)) for _ in range(4)]
        image[painter.shape("polygon", corners)] *= rng.uniform(0.5, 0.8)
    image *= 1 + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, width)[None, :, None]
    image = (image * rng.uniform(0.75, 1.15) + rng.uniform(-10, 30)) * rng.normal(1, 0.06, 3)
    blurred = Image.fromarray(image.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1)))
    noisy = np.asarray(blurred) + rng.normal(0, rng.uniform(2, 8), image.shape)
    return Pair(noisy.clip(0, 255).astype(np.uint8), painter.labels)


def run(config: Config) -> None:
    """Write the folder."""
    check_counts(config, "train", "val")
    check_seed(config.seed)
    out = make_folder(config.out)
    photographs: list[UInt8[np.ndarray, "h w 3"]] = load_sample_images().images
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for n in trange(config.train + config.val, unit="image"):
        image, labels = draw_street(np.random.default_rng((config.seed, n)), photographs)
        Image.fromarray(image).save(out / f"JPEGImages/{n}.png")
        Image.fromarray(labels).save(out / f"SegmentationClass/{n}.png")
    lists = {"train": range(config.train), "val": range(config.train, config.train + config.val)}
    for part, numbers in lists.items():
        (out / f"ImageSets/Segmentation/{part}.txt").write_text("".join(f"{n}\n" for n in numbers))
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))


if __name__ == "__main__":
    enter(Config, run, __doc__)
