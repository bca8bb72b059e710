"""Class maps of images and rasters of any size, by overlapping windows."""

from drd_hf.inference.image import predict_image
from drd_hf.inference.raster import model_fingerprint, predict_raster, source_facts
from drd_hf.inference.windows import WindowGrid, blended_blocks, window_grid

__all__ = [
    "WindowGrid",
    "blended_blocks",
    "model_fingerprint",
    "predict_image",
    "predict_raster",
    "source_facts",
    "window_grid",
]
