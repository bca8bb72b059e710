"""Windows over an image: where they lie, what the model says about them, and how their answers are blended.

Rows and columns that no later window touches are given away at once. What stays in memory is one window's width of the
window row at work, and the rows that this window row shares with the next one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from drd_hf.data.tiles import tile_origins
from drd_hf.data.transforms import normalization_of, normalize
from drd_hf.errors import UserError
from drd_hf.features import input_channels

# Networks halve sizes five times and round up. Where the size of a window is no multiple of this, coarse features end up
# to 31 pixels off when they are stretched to the size of the fine ones; where its first pixel is none, they see a grid
# other than that of its neighbours.
MULTIPLE = 32
ReadRows = Callable[[int, np.ndarray], np.ndarray | None]


class NotFinite(UserError):
    """A model's logits are no numbers; who knows the image adds its name."""

    def __init__(self, message: str = ""):
        super().__init__(
            message
            or "the model answers with NaN or infinity: compute in float32 or bfloat16, or take another checkpoint"
        )


@dataclass(frozen=True)
class WindowGrid:
    """Windows of `window` = (height, width) pixels that cover an image; `rows` and `columns` are their first pixels.

    The last ones may reach up to 31 pixels beyond the image.
    """

    height: int
    width: int
    window: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def row_ends(self) -> tuple[int, ...]:
        """For each window row the first pixel row that the next one touches too."""
        return (*self.rows[1:], self.height)

    @property
    def column_ends(self) -> tuple[int, ...]:
        return (*self.columns[1:], self.width)

    def first_touching(self, row: int) -> int:
        """The first window row that covers a pixel row."""
        return next(i for i, top in enumerate(self.rows) if top + self.window[0] > row)


class Block(NamedTuple):
    """A finished part of the image.

    `probabilities` are float32 (K, h, w) on the model's device and add up to 1 over K, or are all 0 in places where no
    window had data; `valid` is bool (h, w), None where every pixel has data.
    """

    row: int
    column: int
    probabilities: torch.Tensor
    valid: np.ndarray | None


def window_grid(height: int, width: int, tile: int, overlap: float) -> WindowGrid:
    """The windows of `tile` pixels, each of which shares the part `overlap` with the next one, or a little more.

    They start at multiples of 32 pixels, if a step has as many, and cover the image continued to multiples of 32 to the
    right and below. The last window of a row or column is shifted inward to end there. An image smaller than a tile is
    one window.

    Raises:
        UserError: `tile` and `overlap` leave no step.
    """
    if not 0 <= overlap < 1 or tile < 1:
        raise UserError(f"tile={tile}, overlap={overlap}: give a tile of at least 1 pixel and 0 <= overlap < 1")
    multiple = MULTIPLE if tile >= MULTIPLE else 1
    stride = max(1, round(tile * (1 - overlap)))
    stride -= stride % multiple if stride > multiple else 0
    continued = [-(-length // multiple) * multiple for length in (height, width)]
    window = tuple(min(tile, length) for length in continued)
    rows, columns = (
        tuple(tile_origins(length, side, min(stride, side))) for length, side in zip(continued, window, strict=True)
    )
    return WindowGrid(height, width, window, rows, columns)


@torch.inference_mode()
def blended_blocks(
    model: PreTrainedModel,
    processor,
    read: ReadRows,
    grid: WindowGrid,
    batch_size: int = 4,
    first: int = 0,
    last: int | None = None,
    progress: Callable[[int], None] = lambda windows: None,
) -> Iterator[Block]:
    """Class probabilities of an image, in blocks that cover it once: from top to bottom, in each window row from left to right.

    Args:
        model, processor: as in `predict_image`; the model is left in eval mode.
        read: `read(row, pixels)` fills uint8 (count, W, C) with the rows from `row` on and, where pixels are without
            data, gives bool (count, W) that is False there; else None. It is called with ascending rows and for no row
            twice.
        batch_size: windows per forward pass. A batch ends with its window row, so that a part of the window rows gives
            the same numbers as all of them.
        first, last: window rows whose blocks are wanted, `last` excluded. Those above that reach into them are predicted
            too.
        progress: called with the number of windows that were predicted since the last call.

    Raises:
        NotFinite: a logit is NaN or infinite.
    """
    (height, width), number = grid.window, model.config.num_labels
    last = len(grid.rows) if last is None else last
    start = grid.first_touching(grid.rows[first])
    device = model.device
    down = [weights.to(device)[:, None] for weights in _weights(grid.rows, height)]
    across = [weights.to(device) for weights in _weights(grid.columns, width)]
    shared = [top + height - end for top, end in zip(grid.rows, grid.row_ends, strict=True)]
    carry = torch.zeros(number, max(shared[start:last]), grid.width, device=device)
    carried = 0  # rows of `carry` that the window row before has written
    strip = _Strip(read, grid, input_channels(model), grid.rows[start])
    model.eval()
    for i in range(start, last):
        top, done = grid.rows[i], height - shared[i]
        strip.move(top)
        finite = torch.ones((), dtype=torch.bool, device=device)
        overlap = torch.zeros(number, height, 0, device=device)  # sums of the columns that the next window covers too
        for begin in range(0, len(grid.columns), batch_size):
            batch = range(len(grid.columns))[begin : begin + batch_size]
            places = {j: slice(grid.columns[j], grid.columns[j] + width) for j in batch}
            seen = [j for j in batch if strip.valid is None or strip.valid[:, places[j]].any()]
            logits = _logits(model, processor, [strip.pixels[:, places[j]] for j in seen]) if seen else []
            answers = dict(zip(seen, logits, strict=True))
            if seen:
                finite = finite & logits.isfinite().all()
            if batch.stop == len(grid.columns) and not finite:  # once in a window row: on a GPU, asking means waiting
                raise NotFinite
            for j in batch:
                if j in answers:
                    resized = F.interpolate(
                        answers[j][None].float(), size=grid.window, mode="bilinear", align_corners=False
                    )
                    part = resized[0].softmax(dim=0).mul_(down[i] * across[j])
                else:
                    part = torch.zeros(number, height, width, device=device)
                part[:, :, : overlap.shape[2]] += overlap
                column, ready = grid.columns[j], grid.column_ends[j] - grid.columns[j]
                columns = slice(column, column + ready)
                block, overlap = part[:, :, :ready], part[:, :, ready:]
                block[:, :carried] += carry[:, :carried, columns]
                carry[:, : shared[i], columns] = block[:, done:]
                if i >= first:
                    valid = None if strip.valid is None else strip.valid[:done, columns].copy()
                    yield Block(top, column, block[:, :done], valid)
            progress(len(batch))
        carried = shared[i]


def class_ids(probabilities: torch.Tensor) -> torch.Tensor:
    """The likeliest class: float (K, h, w) -> uint8 (h, w)."""
    return probabilities.max(dim=0).indices.to(torch.uint8)  # argmax takes ten times as long on a CPU


class _Strip:
    """The pixels of a window row, continued by their reflection where it reaches beyond the image.

    `pixels` is uint8 (h, W, C); `valid` is bool (h, W), False without data and beyond the image, or None: all have data.
    One buffer for all window rows: copies of strips would be most of the memory that grows with the width of an image.
    """

    def __init__(self, read: ReadRows, grid: WindowGrid, bands: int, top: int):
        self.read, self.grid = read, grid
        self.pixels = np.empty((grid.window[0], grid.columns[-1] + grid.window[1], bands), np.uint8)
        self.valid = None
        self.top = self.end = top

    def move(self, top: int) -> None:
        """Down to the rows from `top` on; those that are here already move up, the others are read."""
        kept, shift, width = self.end - top, top - self.top, self.grid.width
        self.top, self.end, read_to = top, min(top + len(self.pixels), self.grid.height), self.end
        rows = self.end - top
        self.pixels[:kept] = self.pixels[shift : shift + kept]
        valid = self.read(read_to, self.pixels[kept:rows, :width]) if rows > kept else None
        self.pixels[:rows, width:] = self.pixels[:rows, _reflection(width, self.pixels.shape[1])]
        self.pixels[rows:] = self.pixels[_reflection(rows, len(self.pixels))]
        if valid is not None and self.valid is None:
            self.valid = np.ones(self.pixels.shape[:2], bool)
        if self.valid is not None:
            self.valid[:kept] = self.valid[shift : shift + kept]
            self.valid[kept:rows] = True
            if valid is not None:
                self.valid[kept:rows, :width] = valid
            self.valid[rows:] = self.valid[:, width:] = False


def _reflection(length: int, continued: int) -> np.ndarray:
    """Where the pixels from `length` to `continued` are taken from."""
    return np.pad(np.arange(length), (0, continued - length), mode="symmetric")[length:]


def _logits(model: PreTrainedModel, processor, windows: list[np.ndarray]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack(windows)).to(model.device).permute(0, 3, 1, 2)  # (B, C, h, w) uint8
    pixel_values = normalize(pixels, *normalization_of(processor))
    return model(pixel_values=pixel_values.to(model.dtype)).logits


def _weights(origins: tuple[int, ...], length: int) -> list[torch.Tensor]:
    """Along one axis, for each window the weights of its pixels: Hann windows, over their sum at each pixel.

    The grid is full, so that the weight of a pixel in a window is the product of those of its row and its column.
    """
    hann = _hann(length)
    total = torch.zeros(origins[-1] + length, dtype=hann.dtype)
    for origin in origins:
        total[origin : origin + length] += hann
    return [(hann / total[origin : origin + length]).float() for origin in origins]


def _hann(length: int) -> torch.Tensor:
    """Hann window without its zero ends: every pixel keeps some weight."""
    return torch.sin((torch.arange(length, dtype=torch.float64) + 0.5) / length * torch.pi).square()
