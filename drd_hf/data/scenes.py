"""Generated aerial scenes: a small town from above with exact labels in the six ISPRS classes.

Every object is painted three times with one mask: its reflectance, its height in metres and its label. Light is
computed at the end from the heights (roof slopes, crown texture and cast shadows come from the same sun), so shadows
never touch a label.
Objects are painted on a canvas of twice the resolution; the image is its 2 x 2 mean, the label its 2 x 2 majority.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageFilter

from drd_hf.data.facts import ISPRS_CLASSES, DatasetFacts
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.errors import UserError

GSD = 0.4  # metres per pixel
SCENES = DatasetFacts(
    name="scenes",
    classes=ISPRS_CLASSES,
    description="Generated aerial scenes (no photographs): small towns with exact labels in the ISPRS classes.",
    license="apache-2.0",
    ground_sampling_distance=GSD,
)

IMPERVIOUS, BUILDING, LOW_VEGETATION, TREE, CAR, CLUTTER = range(6)
FREE, STREET, OBJECT = range(3)  # what already stands on a canvas pixel
OVERSAMPLING = 2
PAVEMENT = 1.6  # metres


def _palette(codes: str) -> list[np.ndarray]:
    return [np.array(ImageColor.getrgb(f"#{code}")) / 255 for code in codes.split()]


# Reflectances. Families overlap on purpose, so that colour alone does not give the class away.
TILES = _palette("944a38 ad6b4d 6b5240 404247 787878 ccc9c2 606953 9e8a61")
FLAT_ROOFS = _palette("787878 8a8c8f ccc9c2 404247 5c6e42 9e8a61 6b5240")
GRASS = _palette("547536 6b7540 666640 998757 455f30")
CROWNS = _palette("3d5c2b 294024 5e7336 856633 734a2b 5c5442")
GRAVEL = _palette("9e9687 857d70 757575 8c7057")
PAINTS = _palette("d9d9d9 b3b5b8 73757a 29292e 1a1c1f 8c211f 293d6b 385742 998561 b86b24")
WATER = _palette("387387 5999a8 293d38 40523d")
MATERIAL = _palette("b39975 8c857a 664f3d 9e664d")
COURTS = _palette("944a38 ad6b4d 5c6e42 3f6a5a")


def generate_scene(seed: int, size: int | tuple[int, int] = 384, gsd: float = GSD) -> tuple[np.ndarray, np.ndarray]:
    """One generated orthophoto and its labels; the same arguments give the same arrays.

    Args:
        seed: any non-negative integer; scenes of different seeds differ in layout and in appearance.
        size: side of a square scene or (height, width), each 16 to 2048 pixels; takes about 1.2 kB of memory a pixel.
        gsd: ground sampling distance in metres per pixel, 0.1 to 2.

    Returns:
        image, uint8 (H, W, 3), and label, uint8 (H, W) with values 0..5 in the order of `ISPRS_CLASSES`.

    Raises:
        UserError: `seed`, `size` or `gsd` out of range.
    """
    height, width = _checked(seed, size, gsd)
    rng = np.random.default_rng(seed)
    canvas = Canvas(rng, height, width, gsd)
    town = Town(rng, math.hypot(height, width) * gsd)
    _paint_town(canvas, town)
    return _photograph(canvas, gsd), _majority(canvas.label)


@dataclass(frozen=True)
class SceneRecord:
    """The scene of a seed."""

    seed: int

    @property
    def name(self) -> str:
        return f"scene_{self.seed:06d}"


@dataclass(frozen=True)
class SceneReader:
    """Generates scenes of `size` x `size` pixels as if they were read, for `prepare_dataset`."""

    size: int = 384
    bands = ("red", "green", "blue")

    def header(self, record: SceneRecord) -> SourceHeader:
        height, width = _checked(record.seed, self.size, GSD)
        return SourceHeader(record.name, height, width, identity=f"seed {record.seed}")

    def read(self, record: SceneRecord) -> SourceImage:
        return SourceImage(record.name, *generate_scene(record.seed, self.size))


def scene_records(counts: Mapping[str, int], seed: int = 0) -> dict[str, list[SceneRecord]]:
    """So many scenes for each split, none for a count of 0. No scene is in two splits, or under two values of `seed`.

    Raises:
        UserError: a negative seed, or a count that is not 0 to 10,000.
    """
    if seed < 0 or any(not 0 <= count <= 10_000 for count in counts.values()):
        raise UserError("--seed must be at least 0 and the numbers of scenes 0 to 10000")
    first = {split: 10_000 * (len(counts) * seed + i) for i, split in enumerate(counts)}
    return {split: [SceneRecord(first[split] + i) for i in range(count)] for split, count in counts.items() if count}


def _checked(seed, size, gsd) -> tuple[int, int]:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"seed must be a non-negative integer, not {seed!r}")
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    whole = all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or not all(16 <= side <= 2048 for side in sides):
        raise UserError(f"size must be an integer or (height, width), each 16 to 2048 pixels, not {size!r}")
    if isinstance(gsd, bool) or not isinstance(gsd, (int, float, np.number)) or not 0.1 <= gsd <= 2:
        raise UserError(f"gsd must be 0.1 to 2 metres per pixel, not {gsd!r}")
    return sides


class Canvas:
    """Reflectance, height, label and occupancy of a scene at twice its resolution; ground coordinates in metres."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, gsd: float):
        self.rng = rng
        self.metres = gsd / OVERSAMPLING
        self.shape = (height * OVERSAMPLING, width * OVERSAMPLING)
        self.reflectance = np.empty((*self.shape, 3), np.float32)
        self.height = np.zeros(self.shape, np.float32)
        self.label = np.full(self.shape, LOW_VEGETATION, np.uint8)
        self.taken = np.full(self.shape, FREE, np.uint8)
        self.fine, self.patchy = self.noise(0.5), self.noise(2.0) * 0.6 + self.noise(9.0) * 0.4
        self.roofs = [_pick(rng, TILES) for _ in range(4)]
        self.grass = [_pick(rng, GRASS) for _ in range(2)]
        self.crowns = [_pick(rng, CROWNS) for _ in range(3)]
        self.gravel = [_vary(rng, _pick(rng, GRAVEL)) for _ in range(2)]
        self.asphalt = rng.uniform(0.24, 0.52) + np.array([0.01, 0.0, -0.01]) * rng.normal()

    def noise(self, metres: float) -> np.ndarray:
        """Smooth zero-mean, unit-variance noise with features of about `metres`, float32 of the canvas' shape."""
        cells = [max(4, math.ceil(side * self.metres / metres)) for side in self.shape]
        field = Image.fromarray(self.rng.standard_normal(cells, np.float32))
        field = np.asarray(field.resize(self.shape[::-1], Image.Resampling.BICUBIC))
        return (field - field.mean()) / field.std()

    def ground(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y in metres of every pixel centre, from the scene's centre; shapes (1, W) and (H, 1)."""
        y, x = ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * np.float32(self.metres) for n in self.shape)
        return x[None, :], y[:, None]

    def window(self, x: float, y: float, angle: float, reach: float):
        """The pixels within `reach` of (x, y): their slices, and metres along and across `angle`."""
        row, col = y / self.metres + (self.shape[0] - 1) / 2, x / self.metres + (self.shape[1] - 1) / 2
        r = reach / self.metres + 1
        top, bottom = (min(max(0, math.ceil(edge)), self.shape[0]) for edge in (row - r, row + r))
        left, right = (min(max(0, math.ceil(edge)), self.shape[1]) for edge in (col - r, col + r))
        dy = ((np.arange(top, bottom) - row) * self.metres).astype(np.float32)[:, None]
        dx = ((np.arange(left, right) - col) * self.metres).astype(np.float32)[None, :]
        cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        return (slice(top, bottom), slice(left, right)), dx * cos + dy * sin, dy * cos - dx * sin

    def paint(self, where, mask, label, colour, height=None, taken=None) -> None:
        """Paint the masked pixels of the window `where`; `colour`: (3,) or (h, w, 3), `height`: a number or (h, w)."""
        colour = np.asarray(colour, np.float32)
        self.reflectance[where][mask] = colour if colour.ndim == 1 else colour[mask]
        self.label[where][mask] = label
        if height is not None:
            self.height[where][mask] = height[mask] if isinstance(height, np.ndarray) else height
        if taken is not None:
            self.taken[where][mask] = taken


class Town:
    """A jittered street grid in town coordinates (u, v), bent and rotated into ground (x, y); all in metres."""

    def __init__(self, rng: np.random.Generator, extent: float):
        self.angle = rng.uniform(0, math.pi)
        self.bends = [(rng.uniform(0, 7), rng.uniform(28, 50), rng.uniform(0, 6.3)) for _ in range(2)]
        self.lines = [_line_positions(rng, extent / 2 + 90, *spacing) for spacing in ((46, 60), (56, 88))]
        self.half_widths = [rng.uniform(2.4, 3.7, len(lines)) for lines in self.lines]
        u, v = (len(lines) for lines in self.lines)
        # [axis][line, cell]: is there a street on this side of the cell? A missing one joins two blocks.
        self.open = [rng.random((u, v + 1)) > 0.12, rng.random((v, u + 1)) > 0.12]

    def to_ground(self, u, v):
        (a, length_a, phase_a), (b, length_b, phase_b) = self.bends
        u = u + a * np.sin(v / length_a + phase_a)
        v = v + b * np.sin(u / length_b + phase_b)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return u * cos - v * sin, u * sin + v * cos

    def box(self, i: int, j: int) -> tuple[float, float, float, float]:
        """u0, u1, v0, v1 of the block before lines i and j, without streets and pavements."""
        edges = []
        for lines, halves, k in zip(self.lines, self.half_widths, (i, j), strict=True):
            edges += [lines[k - 1] + halves[k - 1] + PAVEMENT, lines[k] - halves[k] - PAVEMENT]
        return tuple(edges)

    def slots(self, axis: int, step: float, margin: float):
        """Line, half width and position every `step` metres along the streets of an axis, crossings left out."""
        across = self.lines[1 - axis]
        for line, half, is_open in zip(self.lines[axis], self.half_widths[axis], self.open[axis], strict=True):
            for along in np.arange(across[0], across[-1], step):
                if is_open[np.searchsorted(across, along)] and np.abs(across - along).min() > margin:
                    yield line, half, along

    def to_town(self, x, y):
        """The inverse of `to_ground`."""
        (a, length_a, phase_a), (b, length_b, phase_b) = self.bends
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        u, v = x * cos + y * sin, y * cos - x * sin
        v = v - b * np.sin(u / length_b + phase_b)
        return u - a * np.sin(v / length_a + phase_a), v

    def place(self, u, v, axis: int = 1) -> tuple[float, float, float]:
        """Ground x, y and the direction (radians) in which coordinate `axis` (0: u, 1: v) grows there."""
        du, dv = (1, 0) if axis == 0 else (0, 1)
        (x0, y0), (x1, y1) = self.to_ground(u - du, v - dv), self.to_ground(u + du, v + dv)
        return (x0 + x1) / 2, (y0 + y1) / 2, math.atan2(y1 - y0, x1 - x0)


def _line_positions(rng, reach, low, high) -> np.ndarray:
    steps = rng.uniform(low, high, 2 * math.ceil(reach / low) + 2)
    return np.cumsum(steps) - steps.sum() / 2 - rng.uniform(0, low)


def _pick(rng, options):
    return options[rng.integers(len(options))]


def _vary(rng, colour, amount=0.06) -> np.ndarray:
    """`colour` a little lighter or darker, and a little off hue."""
    return np.clip(np.asarray(colour) * (1 + amount * rng.normal()) + 0.2 * amount * rng.normal(size=3), 0.03, 0.95)


def _textured(colour, *textures) -> np.ndarray:
    """(3,) colour times the product of the (h, w) textures -> (h, w, 3)."""
    return np.asarray(colour, np.float32) * math.prod(textures)[..., None]


def _paint_town(canvas: Canvas, town: Town) -> None:
    coordinates = town.to_town(*canvas.ground())
    cells = [np.searchsorted(*pair) for pair in zip(town.lines, coordinates, strict=True)]
    columns = len(town.lines[1]) + 1
    blocks = [divmod(int(k), columns) for k in np.flatnonzero(np.bincount((cells[0] * columns + cells[1]).ravel()))]
    boxes = {block: town.box(*block) for block in blocks}
    blocks.sort(key=lambda block: math.hypot(sum(boxes[block][:2]), sum(boxes[block][2:])))
    # Dealt from the scene's centre outwards, so that every scene has a bit of everything.
    deck = [_houses, _terraces, _flats, _yard, _park, _houses]
    deck = [deck[k] for k in canvas.rng.permutation(len(deck))]
    kinds = {block: deck[n % len(deck)] for n, block in enumerate(blocks)}
    _paint_grounds(canvas, cells, kinds)
    _paint_streets(canvas, town, coordinates, cells)
    for block, kind in kinds.items():
        kind(canvas, town, *boxes[block])
    _park_along_streets(canvas, town)
    for block, kind in kinds.items():
        _plant_block(canvas, town, *boxes[block], dense=kind is _park)
    _plant_avenues(canvas, town)


def _paint_grounds(canvas, cells, kinds) -> None:
    """Lawns, dry grass and paved yards, one ground per block."""
    table = np.zeros((cells[0].max() + 1, cells[1].max() + 1, 3), np.float32)
    paved = np.zeros(table.shape[:2], bool)
    for block, kind in kinds.items():
        paved[block] = kind is _yard or (kind is _terraces and canvas.rng.random() < 0.25)
        table[block] = _vary(canvas.rng, _pick(canvas.rng, canvas.gravel if paved[block] else canvas.grass))
    paved = paved[cells[0], cells[1]]
    strength = np.where(paved, np.float32(0.4), np.float32(1.0))
    canvas.reflectance[:] = table[cells[0], cells[1]]
    canvas.reflectance *= (1 + strength * (0.07 * canvas.fine + 0.09 * canvas.patchy))[..., None]
    canvas.label[paved] = IMPERVIOUS


def _paint_streets(canvas, town, coordinates, cells) -> None:
    gaps, marks = [], np.zeros(canvas.shape, bool)
    for axis in (0, 1):
        lines, halves, near = town.lines[axis], town.half_widths[axis], np.full(canvas.shape, 1e3, np.float32)
        along = coordinates[1 - axis]
        for side in (-1, 0):
            k = cells[axis] + side
            centre = np.abs(coordinates[axis] - lines.astype(np.float32)[k])
            present = town.open[axis][k, cells[1 - axis]]
            near = np.where(present, np.minimum(near, centre - halves.astype(np.float32)[k]), near)
            marks |= present & (centre < 0.13) & (along % 6 < 3)
        gaps.append(near)
    gap = np.minimum(*gaps)
    everywhere = (slice(None), slice(None))
    wear = (1 + 0.03 * canvas.fine + 0.05 * canvas.patchy)[..., None]
    asphalt = canvas.asphalt.astype(np.float32) * wear
    pavement = asphalt * np.float32(canvas.rng.uniform(1.15, 1.45))
    canvas.paint(everywhere, gap < PAVEMENT, IMPERVIOUS, pavement, taken=STREET)
    canvas.paint(everywhere, gap < 0, IMPERVIOUS, asphalt)
    # Centre lines stop where the other street crosses.
    canvas.paint(everywhere, marks & (np.maximum(*gaps) > 2), IMPERVIOUS, (0.85, 0.85, 0.82))
    if canvas.rng.random() < 0.5:
        _paint_roundabout(canvas, town)


def _paint_roundabout(canvas, town) -> None:
    rng = canvas.rng
    x, y, _ = town.place(*(lines[np.argmin(np.abs(lines))] for lines in town.lines))
    where, s, t = canvas.window(x, y, 0, 13)
    radius, texture = np.hypot(s, t), 1 + 0.04 * canvas.patchy[where]
    canvas.paint(where, radius < 13, IMPERVIOUS, _textured(canvas.asphalt * 1.3, texture), taken=STREET)
    canvas.paint(where, radius < 11.2, IMPERVIOUS, _textured(canvas.asphalt, texture))
    canvas.paint(where, radius < 5.2, IMPERVIOUS, (0.7, 0.7, 0.68), taken=OBJECT)
    canvas.paint(where, radius < 4.8, LOW_VEGETATION, _textured(canvas.grass[0], texture))
    for _ in range(rng.integers(4)):
        _tree(canvas, x + rng.uniform(-2.5, 2.5), y + rng.uniform(-2.5, 2.5), rng.uniform(1.4, 2.6))


def _houses(canvas, town, u0, u1, v0, v1) -> None:
    """Detached houses in gardens, one row along each side of the block."""
    rng, depth = canvas.rng, (u1 - u0) / 2
    lots = max(1, round((v1 - v0) / rng.uniform(14.5, 19)))
    pitch = (v1 - v0) / lots
    for edge, inward in ((u0, 1), (u1, -1)):
        for v in v0 + pitch * (np.arange(lots) + 0.5):
            length, width, setback = pitch - rng.uniform(3.2, 5), rng.uniform(10, 13.5), rng.uniform(2, 4)
            drive, paving = v + pitch / 2 - 1.5, _pick(rng, canvas.gravel)
            _slab(canvas, *town.place(edge + inward * setback, drive, 0), 2 * setback + 2, 2.8, paving)
            if rng.random() < 0.5:
                _car(canvas, *town.place(edge + inward * 3.2, drive, 0))
            x, y, angle = town.place(edge + inward * (setback + width / 2), v - 0.8)
            turn = math.pi / 2 * (rng.random() < 0.25 and length < 12) + rng.normal() * 0.02
            _building(canvas, x, y, angle + turn, length, width, rear=-inward)
            terrace = town.place(edge + inward * (setback + width + 2), v - 1)
            _slab(canvas, *terrace, length * rng.uniform(0.4, 0.9), 3.6, paving)
            corner = town.place(edge + inward * rng.uniform(depth - 5, depth - 2.5), v + rng.uniform(-4, 4))
            extra = rng.random()
            if extra < 0.35:
                _basin(canvas, *corner, rng.uniform(5, 9), rng.uniform(3.5, 5), oval=rng.random() < 0.4)
            elif extra < 0.60:
                _building(canvas, *corner, rng.uniform(3, 6), rng.uniform(2.5, 4), "rect", storeys=0.8)
            elif extra < 0.75:
                _heap(canvas, *corner, rng.uniform(1.5, 2.8))


def _terraces(canvas, town, u0, u1, v0, v1) -> None:
    """Terraced houses along two streets; garages, skips and heaps in the courts or gardens behind."""
    rng = canvas.rng
    for edge, inward in ((u0, 1), (u1, -1)):
        width, kind, storeys = rng.uniform(10.5, 13), _pick(rng, ("gable", "flat", "gable")), rng.uniform(2, 3.5)
        v = v0 + 1
        while v + 6 < v1:
            length = min(rng.uniform(7, 14), v1 - v)
            place = town.place(edge + inward * (width / 2 + rng.uniform(0.3, 1.5)), v + length / 2)
            _building(canvas, *place, length + 0.5, width, "rect", kind, storeys + rng.normal() * 0.2, joined=True)
            v += length + 4 * (rng.random() < 0.12)
    for v in np.arange(v0 + 4, v1 - 4, 7.5):
        place, extra = town.place((u0 + u1) / 2 + rng.uniform(-4, 4), v, rng.integers(2)), rng.random()
        if extra < 0.25:
            _building(canvas, *place, 6.5, 5.5, "rect", "flat", storeys=0.9)
        elif extra < 0.45:
            _car(canvas, *place)
        elif extra < 0.65:
            _container(canvas, *place)
        elif extra < 0.8:
            _slab(canvas, *place, 7, 7, _pick(rng, canvas.gravel))
        else:
            _heap(canvas, *place, rng.uniform(1.5, 3))


def _flats(canvas, town, u0, u1, v0, v1) -> None:
    """Blocks of flats on lawns around a parking lot."""
    rng, u, depth = canvas.rng, (u0 + u1) / 2, u1 - u0
    for v, side in ((v0, 1), (v1, -1)):
        width, shape, kind = rng.uniform(12, 15), _pick(rng, ("rect", "T", "L")), _pick(rng, ("flat", "flat", "hip"))
        place, length = town.place(u, v + side * (width / 2 + 3), 0), depth - rng.uniform(4, 7)
        _building(canvas, *place, length, width, shape, kind, storeys=rng.uniform(3, 5), rear=side)
    _parking(canvas, *town.place(u + rng.uniform(-3, 3), (v0 + v1) / 2, 0), depth - 7, 16)
    for side in (-1, 1):
        place = town.place(u + rng.uniform(-0.3, 0.3) * depth, (v0 + v1) / 2 + side * 11, 0)
        if rng.random() < 0.5:
            _container(canvas, *place)
        else:
            _basin(canvas, *place, rng.uniform(4, 8), 4, oval=True)


def _yard(canvas, town, u0, u1, v0, v1) -> None:
    """Halls on a gravelled or paved yard with containers, heaps and rubble."""
    rng, u = canvas.rng, (u0 + u1) / 2
    split = v0 + (v1 - v0) * rng.uniform(0.45, 0.55)
    for low, high in ((v0, split),) if rng.random() < 0.5 else ((v0, split), (v1 - 15, v1)):
        place, kind = town.place(u + rng.uniform(-2, 2), (low + high) / 2, 0), _pick(rng, ("flat", "flat", "gable"))
        _building(canvas, *place, u1 - u0 - rng.uniform(5, 9), high - low - rng.uniform(2, 5), "rect", kind, 2.2)
    _rubble(canvas, *town.place(rng.uniform(u0 + 8, u1 - 8), split + 10), rng.uniform(5, 8))
    for v in np.arange(split + 3, v1 - 2, 4.0):
        for u in np.arange(u0 + 3.5, u1 - 3, 7.2):
            place, extra = town.place(u + rng.normal() * 0.4, v + rng.normal() * 0.3, 0), rng.random()
            if extra < 0.25:
                _container(canvas, *place)
            elif extra < 0.42:
                _car(canvas, *place, van=rng.random() < 0.35)
            elif extra < 0.50:
                _heap(canvas, *place, rng.uniform(1.5, 3.5))


def _park(canvas, town, u0, u1, v0, v1) -> None:
    """A mown or dry meadow with a path, basins, a court or a pavilion."""
    rng, gravel = canvas.rng, canvas.gravel[0]
    x, y, angle = town.place((u0 + u1) / 2, (v0 + v1) / 2)
    where, s, t = canvas.window(x, y, angle + rng.uniform(-0.6, 0.6), math.hypot(u1 - u0, v1 - v0) / 2)
    x, y = canvas.ground()
    u, v = town.to_town(x[:, where[1]], y[where[0]])
    meadow = (canvas.taken[where] == FREE) & (u > u0) & (u < u1) & (v > v0) & (v < v1)
    if rng.random() < 0.6:
        stripes = 1 + rng.uniform(0.05, 0.12) * np.sign(np.sin(t * (2 * math.pi / rng.uniform(3, 6))))
        canvas.reflectance[where][meadow] *= stripes[meadow][:, None]
    path = meadow & (np.abs(t - 5 * np.sin(s / 12)) < rng.uniform(1.0, 1.6))
    canvas.paint(where, path, IMPERVIOUS, _textured(gravel, 1 + 0.05 * canvas.fine[where]))
    for quarter in rng.permutation(4)[:3]:
        place = town.place(u0 + (u1 - u0) * (0.27, 0.73)[quarter % 2], v0 + (v1 - v0) * (0.27, 0.73)[quarter // 2])
        extra = rng.random()
        if extra < 0.45:
            _basin(canvas, *place, rng.uniform(14, 20), rng.uniform(9, 13), oval=True)
        elif extra < 0.7:
            _court(canvas, *place, 24, 11)
        else:
            _building(canvas, *place, rng.uniform(13, 18), rng.uniform(10, 13))


def _building(canvas, x, y, angle, length, width, shape=None, kind=None, storeys=None, rear=1, joined=False) -> None:
    """A building of one or two wings; the highest roof wins, which makes the valleys.

    `rear` is the sign of the across coordinate to which a second wing stands out; `joined` ones may touch others.
    """
    rng = canvas.rng
    shape = shape or _pick(rng, ("rect", "rect", "L", "T"))
    kind = kind or _pick(rng, ("gable", "gable", "hip", "flat"))
    eave = 2.9 * (storeys or rng.uniform(1, 2.2)) + 0.3
    slope = 0 if kind == "flat" else rng.uniform(0.45, 0.9)
    where, s, t = canvas.window(x, y, angle, math.hypot(length, width) / 2 + width * 0.5)
    wings = [(s, t, length / 2, width / 2)]
    if shape != "rect":
        reach = width * rng.uniform(0.3, 0.45)  # how far the second wing stands out
        offset = 0 if shape == "T" else _pick(rng, (-1, 1)) * (length / 2 - width * 0.35)
        wings.append((t * rear - reach / 2, s - offset, width / 2 + reach / 2, width * 0.35))
    height, rows = np.zeros(s.shape, np.float32), np.ones(s.shape, np.float32)
    for along, across, a, b in wings:
        ends, sides = a - np.abs(along), b - np.abs(across)
        roof = eave + slope * (np.minimum(ends, sides) if kind == "hip" else sides)
        higher = (ends > 0) & (sides > 0) & (roof > height)
        height[higher] = roof[higher]
        rows[higher] = 1 + 0.05 * np.sign(np.sin(across[higher] * (2 * math.pi / 0.9)))
    mask = height > 0
    if joined:
        mask &= canvas.taken[where] != OBJECT
    if (canvas.taken[where][mask] != FREE).any():
        return
    texture = 1 + 0.03 * canvas.fine[where] + 0.04 * canvas.patchy[where]
    if kind == "flat":
        colour = _vary(rng, _pick(rng, FLAT_ROOFS))
        if shape == "rect":  # a parapet
            rim = np.minimum(length / 2 - np.abs(s), width / 2 - np.abs(t)) < 0.5
            height[rim] += 0.5
            texture[rim] *= 1.15
    else:
        colour, texture = _vary(rng, _pick(rng, canvas.roofs)), texture * rows
    canvas.paint(where, mask, BUILDING, _textured(colour, texture), height, OBJECT)
    if length > 7 and width > 7:
        _roof_fittings(canvas, where, mask, s, t, length, width, kind)


def _roof_fittings(canvas, where, roof, s, t, length, width, kind) -> None:
    """Vents, skylights, chimneys and solar panels; all of them building."""
    rng = canvas.rng

    def patch(a, b, half_length, half_width):
        return roof & (np.abs(s - a * length) < half_length) & (np.abs(t - b * width) < half_width)

    if kind == "flat":
        for _ in range(rng.integers(1, 3 + int(length * width / 90))):
            box = patch(rng.uniform(-0.4, 0.4), rng.uniform(-0.35, 0.35), rng.uniform(0.4, 1.6), rng.uniform(0.4, 1.0))
            height = canvas.height[where] + np.float32(rng.uniform(0.2, 1.2))
            canvas.paint(where, box, BUILDING, _vary(rng, _pick(rng, FLAT_ROOFS)), height)
    else:
        chimney = patch(rng.uniform(-0.3, 0.3), rng.uniform(-0.1, 0.1), 0.45, 0.35)
        canvas.paint(where, chimney, BUILDING, (0.45, 0.38, 0.35), canvas.height[where] + np.float32(1.3))
    if rng.random() < 0.2:
        panels = patch(0, _pick(rng, (-0.25, 0.25)), length * rng.uniform(0.15, 0.35), width * 0.15)
        seams = 1 + 0.25 * (np.abs(s % 1.1) < 0.15).astype(np.float32)
        canvas.paint(where, panels, BUILDING, _textured((0.13, 0.16, 0.24), seams))


def _car(canvas, x, y, angle, van=False) -> None:
    rng = canvas.rng
    length, width = (rng.uniform(5.6, 6.8), 2.1) if van else (rng.uniform(4.2, 4.8), rng.uniform(1.75, 1.95))
    angle += math.pi * rng.integers(2) + rng.normal() * 0.03
    where, s, t = canvas.window(x, y, angle, length / 2)
    body = (2 * s / length) ** 4 + (2 * t / width) ** 4 < 1
    if (canvas.taken[where][body] == OBJECT).any():
        return
    canvas.paint(where, body, CAR, _vary(rng, _pick(rng, PAINTS), 0.1), 2.2 if van else 0.9, OBJECT)
    if van:
        glass = body & (s > 0.34 * length) & (s < 0.44 * length)
    else:
        cabin = body & (s < 0.14 * length) & (s > -0.34 * length)
        canvas.height[where][cabin] = 1.45
        glass = cabin & ((s > 0.14 * length - 0.75) | (s < -0.34 * length + 0.45))
    canvas.reflectance[where][glass] = (0.12, 0.14, 0.17)


def _slab(canvas, x, y, angle, length, width, colour) -> None:
    """Paved ground where nothing stands yet: drives, terraces, courts."""
    where, s, t = canvas.window(x, y, angle, math.hypot(length, width) / 2)
    mask = (np.abs(s) < length / 2) & (np.abs(t) < width / 2) & (canvas.taken[where] == FREE)
    canvas.paint(where, mask, IMPERVIOUS, _textured(colour, 1 + 0.05 * canvas.fine[where]))


def _parking(canvas, x, y, angle, length, width) -> None:
    """A lot with bays of 2.5 m on both sides of an aisle, partly filled."""
    rng, share = canvas.rng, canvas.rng.uniform(0.4, 0.85)
    _slab(canvas, x, y, angle, length, width, canvas.asphalt * rng.uniform(0.9, 1.25))
    where, s, t = canvas.window(x, y, angle, math.hypot(length, width) / 2)
    rows = (np.abs(s) < length / 2) & (np.abs(t) > width / 2 - 4.8) & (np.abs(t) < width / 2)
    lines = rows & ((s + length / 2) % 2.5 < 0.25) & (canvas.taken[where] == FREE)
    canvas.paint(where, lines, IMPERVIOUS, (0.8, 0.8, 0.78))
    cos, sin = math.cos(angle), math.sin(angle)
    for a in np.arange(-length / 2 + 1.35, length / 2 - 1.2, 2.5):
        for b in (-width / 2 + 2.5, width / 2 - 2.5):
            if rng.random() < share:
                _car(canvas, x + a * cos - b * sin, y + a * sin + b * cos, angle + math.pi / 2)


def _park_along_streets(canvas, town) -> None:
    rng, share = canvas.rng, canvas.rng.uniform(0.12, 0.35)
    for axis in (0, 1):
        for line, half, along in town.slots(axis, 6.2, margin=8):
            for side in (-1, 1):
                if rng.random() < share:
                    # At the kerb, or now and then driving in its lane.
                    across = line + side * (half - 1.1 if rng.random() < 0.85 else half / 2)
                    place = town.place(*((across, along) if axis == 0 else (along, across)), 1 - axis)
                    _car(canvas, *place, van=rng.random() < 0.08)


def _clutter(canvas, where, mask, colour, height, texture=0.0) -> bool:
    if (canvas.taken[where][mask] != FREE).any():
        return False
    canvas.paint(where, mask, CLUTTER, _textured(colour, 1 + texture * canvas.fine[where]), height, OBJECT)
    return True


def _basin(canvas, x, y, angle, length, width, oval) -> None:
    """A pool or a pond with a stone rim."""
    where, s, t = canvas.window(x, y, angle, math.hypot(length, width) / 2 + 0.6)
    power, wobble = (2, 1 + 0.08 * canvas.patchy[where]) if oval else (20, 1)
    distance = (np.abs(2 * s / length) ** power + np.abs(2 * t / width) ** power) ** (1 / power) * wobble
    rim = (distance < 1 + 1.2 / width) & (distance >= 1) & (canvas.taken[where] == FREE)
    if _clutter(canvas, where, distance < 1, _vary(canvas.rng, _pick(canvas.rng, WATER)), None, 0.015):
        canvas.paint(where, rim, IMPERVIOUS, (0.68, 0.66, 0.62))


def _court(canvas, x, y, angle, length, width) -> None:
    """A tennis court: clutter in the ISPRS scheme, coloured like a roof or a lawn."""
    where, s, t = canvas.window(x, y, angle, math.hypot(length, width) / 2 + 2)
    edge = np.maximum(np.abs(s) - length / 2, np.abs(t) - width / 2)
    colour = _vary(canvas.rng, _pick(canvas.rng, COURTS))
    if _clutter(canvas, where, edge < 2, colour, None, 0.03):
        cross = (np.abs(s) < 0.13) | (np.abs(np.abs(t) - width * 0.37) < 0.13)
        lines = (np.abs(edge) < 0.13) | (cross & (edge < 0))
        canvas.reflectance[where][lines] = (0.85, 0.85, 0.85)


def _container(canvas, x, y, angle) -> None:
    length = _pick(canvas.rng, (6.1, 6.1, 8.5))
    where, s, t = canvas.window(x, y, angle, length / 2 + 1)
    mask = (np.abs(s) < length / 2) & (np.abs(t) < 1.25)
    if _clutter(canvas, where, mask, _vary(canvas.rng, _pick(canvas.rng, PAINTS), 0.1), 2.6):
        canvas.reflectance[where][mask & (np.abs(s % 0.8) < 0.3)] *= 0.85


def _heap(canvas, x, y, angle, radius) -> None:
    """A cone of sand, gravel, soil or bricks."""
    where, s, t = canvas.window(x, y, angle, radius * 1.3)
    distance = np.hypot(s, t * 1.15) * (1 + 0.12 * canvas.patchy[where]) / radius
    height = (0.7 * radius * (1 - distance) + 0.12 * canvas.fine[where]).clip(0.1)
    _clutter(canvas, where, distance < 1, _vary(canvas.rng, _pick(canvas.rng, MATERIAL)), height, 0.08)


def _rubble(canvas, x, y, angle, radius) -> None:
    """Broken material: rough, in several colours, about knee-high."""
    where, s, t = canvas.window(x, y, angle, radius * 1.4)
    mask = np.hypot(s, t) * (1 + 0.15 * canvas.patchy[where]) < radius
    height = (0.5 + 0.35 * canvas.fine[where] + 0.2 * canvas.patchy[where]).clip(0.05)
    if _clutter(canvas, where, mask, _pick(canvas.rng, MATERIAL), height, 0.22):
        other = mask & (canvas.fine[where] > 0.8)
        canvas.reflectance[where][other] = _pick(canvas.rng, MATERIAL)


def _tree(canvas, x, y, radius, colour=None, conifer=False) -> None:
    """A crown: a lumpy dome or cone, visible where it is higher than what stands there."""
    rng = canvas.rng
    angle = rng.uniform(0, 2 * math.pi)
    where, s, t = canvas.window(x, y, angle, radius * 1.35)
    lumps = 1 + 0.06 * np.sin(5 * np.arctan2(t, s)) + 0.07 * canvas.patchy[where] + 0.05 * canvas.fine[where]
    distance = np.hypot(s, t) * lumps / radius
    dome = 2.2 * (1 - distance) if conifer else 1.2 * np.sqrt((1 - distance**2).clip(0))
    rough = 0.16 if conifer else 0.26
    height = 1.5 + 0.6 * radius + radius * dome + rough * canvas.fine[where]
    colour = _vary(rng, _pick(rng, canvas.crowns) if colour is None else colour, 0.08)
    mask = (distance < 1) & (height > canvas.height[where])
    canvas.paint(where, mask, TREE, _textured(colour, 1 + 0.13 * canvas.fine[where]), height.astype(np.float32))


def _plant(canvas, x, y, radius, **looks) -> None:
    """A tree, unless its trunk would stand on a street or an object."""
    row, col = int(y / canvas.metres + canvas.shape[0] / 2), int(x / canvas.metres + canvas.shape[1] / 2)
    row, col = min(max(row, 0), canvas.shape[0] - 1), min(max(col, 0), canvas.shape[1] - 1)
    if canvas.taken[row, col] == FREE:
        _tree(canvas, x, y, radius, **looks)


def _plant_block(canvas, town, u0, u1, v0, v1, dense) -> None:
    """Single trees and bushes all over the block, and groves of one species."""
    rng, area = canvas.rng, (u1 - u0) * (v1 - v0)
    for _ in range(int(area / 95)):
        x, y, _angle = town.place(rng.uniform(u0, u1), rng.uniform(v0, v1))
        _plant(canvas, x, y, rng.uniform(1.2, 4.0), conifer=rng.random() < 0.2)
    for _ in range(rng.integers(3, 6) if dense else rng.integers(3)):
        u, v, colour = rng.uniform(u0, u1), rng.uniform(v0, v1), _pick(rng, canvas.crowns)
        conifer = rng.random() < 0.3
        for _ in range(rng.integers(8, 24)):
            x, y, _angle = town.place(u + rng.normal() * 5, v + rng.normal() * 5)
            _plant(canvas, x, y, rng.uniform(1.8, 4.2), colour=colour, conifer=conifer)


def _plant_avenues(canvas, town) -> None:
    """Some streets are lined with equal trees on the pavement."""
    rng = canvas.rng
    looks = {}  # species and size by street; None: a street without trees
    for axis in (0, 1):
        for line, half, along in town.slots(axis, rng.uniform(8, 12), margin=9):
            bare = line not in looks and rng.random() > 0.35
            look = looks.setdefault(line, None if bare else (_pick(rng, canvas.crowns), rng.uniform(1.6, 2.8)))
            for side in (-1, 1) if look else ():
                across = line + side * (half + PAVEMENT * 0.7)
                x, y, _angle = town.place(*((across, along) if axis == 0 else (along, across)))
                _tree(canvas, x, y, look[1] * rng.uniform(0.85, 1.15), colour=look[0])


def _photograph(canvas, gsd) -> np.ndarray:
    """Sun, shadows, haze, colour cast, blur and sensor noise -> uint8 (H, W, 3)."""
    rng = canvas.rng
    azimuth, elevation = rng.uniform(0, 2 * math.pi), rng.uniform(math.radians(33), math.radians(60))
    slope_y, slope_x = np.gradient(canvas.height, np.float32(canvas.metres))
    wall = np.hypot(slope_x, slope_y) > 2.5  # a jump in height, not a slope
    slope_x[wall], slope_y[wall] = 0, 0
    facing = math.sin(elevation) - math.cos(elevation) * (slope_x * math.cos(azimuth) + slope_y * math.sin(azimuth))
    facing = facing / np.sqrt(1 + slope_x**2 + slope_y**2) / math.sin(elevation)
    direct = _pool_mean(canvas.reflectance * facing.clip(0.1, 1.6)[..., None].astype(np.float32))
    hidden = _shadows(_pool_mean(canvas.height), azimuth, math.tan(elevation), gsd)
    lit = Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    lit = np.asarray(lit, np.float32)[..., None] / 255
    sky = np.float32(rng.uniform(0.32, 0.5))
    image = _pool_mean(canvas.reflectance) * sky * np.array([0.9, 1.0, 1.15], np.float32) + direct * lit * (1 - sky)

    grey = image.mean(2, keepdims=True)
    image = grey + (image - grey) * rng.uniform(0.6, 1.25)
    image = 0.42 + (image - 0.42) * rng.uniform(0.8, 1.25) + rng.uniform(-0.04, 0.1)
    image = image * (rng.uniform(0.38, 0.52) / image.mean())  # the exposure
    image = image.clip(0, 1) ** rng.uniform(0.8, 1.2) * rng.uniform(0.88, 1.12, 3)
    haze = rng.uniform(0, 0.22)
    image = image * (1 - haze) + haze * np.array([0.66, 0.70, 0.76])
    pixels = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    pixels = np.asarray(pixels.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8))), np.float32)
    noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(1, 6))
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def _shadows(height: np.ndarray, azimuth: float, tangent: float, gsd: float) -> np.ndarray:
    """Where the sun is hidden: bool (H, W), True if something towards `azimuth` rises above the ray to the sun.

    `height` in metres, `tangent` of the sun's elevation; the ray is followed in steps of one pixel of `gsd` metres.
    """
    rows, cols = height.shape
    hidden = np.zeros(height.shape, bool)
    for step in range(1, math.ceil(float(height.max()) / (tangent * gsd)) + 1):
        dy, dx = round(step * math.sin(azimuth)), round(step * math.cos(azimuth))
        if abs(dy) >= rows or abs(dx) >= cols:
            break
        here = slice(max(0, -dy), rows - max(0, dy)), slice(max(0, -dx), cols - max(0, dx))
        there = slice(max(0, dy), rows - max(0, -dy)), slice(max(0, dx), cols - max(0, -dx))
        hidden[here] |= height[there] - height[here] > step * gsd * tangent + 0.25
    return hidden


def _pool_mean(field: np.ndarray) -> np.ndarray:
    """Mean over each 2 x 2 of the canvas: (2H, 2W, ...) -> (H, W, ...)."""
    return (field[::2, ::2] + field[1::2, ::2] + field[::2, 1::2] + field[1::2, 1::2]) / 4


def _majority(label: np.ndarray) -> np.ndarray:
    """The most frequent class of each 2 x 2 of the canvas, the lowest of equals: uint8 (2H, 2W) -> (H, W)."""
    votes = [_pool_mean((label == k).astype(np.float32)) for k in range(len(ISPRS_CLASSES))]
    return np.argmax(np.stack(votes), axis=0).astype(np.uint8)
