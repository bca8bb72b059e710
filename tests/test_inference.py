import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForSemanticSegmentation, MobileNetV2ImageProcessor, SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

from drd_hf.errors import UserError
from drd_hf.inference import predict_image

from .conftest import tiny_config, tiny_model

PROCESSOR = SegformerImageProcessor(do_resize=True, size={"height": 16, "width": 16})  # resizing must be overruled


class ColourModel(nn.Module):
    """Class k where channel k is the brightest: a pixel-wise model, whose answer no window can change."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config, self.scale = tiny_config("segformer"), nn.Parameter(torch.tensor(2.0))

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=self.scale * pixel_values)


@pytest.mark.parametrize("size", [(40, 90), (64, 64), (100, 33), (5, 7), (1, 1)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_windows_do_not_change_what_a_pixelwise_model_says(size, overlap):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = PROCESSOR(images=image, do_resize=False, return_tensors="pt", input_data_format="channels_last")[
        "pixel_values"
    ]
    expected = (2 * pixels).softmax(1)[0].numpy()
    classes, probabilities = predict_image(ColourModel(), PROCESSOR, image, 32, overlap, return_probabilities=True)
    assert classes.shape == size and classes.dtype == np.uint8
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(classes, expected.argmax(0))


def test_processors_that_crop_do_not_move_the_map():
    # MobileNetV2's processor cut 224 x 224 out of each window, and the answer was stretched over the whole of it.
    image = np.random.default_rng(3).integers(0, 256, (300, 310, 3), dtype=np.uint8)
    probabilities = predict_image(ColourModel(), MobileNetV2ImageProcessor(), image, 512, return_probabilities=True)[1]
    pixels = torch.from_numpy(image).permute(2, 0, 1).double() / 127.5 - 1
    np.testing.assert_allclose(probabilities, (2 * pixels).softmax(0).numpy(), atol=1e-5)


def test_an_image_of_one_window_is_what_the_model_says():
    model = tiny_model("segformer").eval()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    logits = model(PROCESSOR(image, do_resize=False, return_tensors="pt")["pixel_values"]).logits
    expected = nn.functional.interpolate(logits, size=(64, 96), mode="bilinear").argmax(1)[0]
    agreement = (predict_image(model, PROCESSOR, image, tile=128) == expected.numpy()).mean()
    assert agreement > 0.999  # weighting and unweighting may decide a tie between two classes the other way


def test_sizes_that_networks_round_up_do_not_shift_the_answer():
    # A SegFormer stretches its coarsest features, 3 cells for 65 pixels, over all of them: classes moved by up to 31 pixels.
    # On a photo of 1074 x 739 pixels windows and the whole image then agreed on 91 % of the pixels, cut to 1056 x 736 on 97 %.
    model = tiny_model("segformer").eval()
    image = np.random.default_rng(5).integers(0, 256, (65, 70, 3), dtype=np.uint8)
    continued = np.pad(image, ((0, 31), (0, 26), (0, 0)), mode="symmetric")
    expected = predict_image(model, PROCESSOR, continued, tile=96, return_probabilities=True)[1][:, :65, :70]
    probabilities = predict_image(model, PROCESSOR, image, tile=96, return_probabilities=True)[1]
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_blended_windows_have_softer_seams_than_cut_ones():
    model = tiny_model("segformer").eval()
    image = np.random.default_rng(2).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    steps = {}
    for overlap in (0.0, 0.5):
        _, p = predict_image(model, PROCESSOR, image, 64, overlap, return_probabilities=True)
        steps[overlap] = np.abs(p[:, :, 64] - p[:, :, 63]).mean()
    assert steps[0.5] < steps[0.0]


def test_wrong_images_and_windows_are_refused():
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(UserError, match=r"the model reads 3 bands: pass a uint8 array \(H, W, 3\), not"):
            predict_image(ColourModel(), PROCESSOR, image)
    with pytest.raises(UserError, match="overlap=1"):
        predict_image(ColourModel(), PROCESSOR, np.zeros((4, 4, 3), np.uint8), overlap=1)


def test_images_of_five_bands_are_normalised_band_by_band():
    config = tiny_config("segformer")
    config.num_channels, config.bands = 5, ["red", "green", "blue", "near_infrared", "height"]
    model = AutoModelForSemanticSegmentation.from_config(config).eval()
    mean, std = np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([0.2, 0.3, 0.2, 0.3, 0.2])
    processor = SegformerImageProcessor(image_mean=mean.tolist(), image_std=std.tolist())
    image = np.random.default_rng(4).integers(0, 256, (64, 64, 5), dtype=np.uint8)
    pixels = torch.from_numpy((image / 255 - mean) / std).float().permute(2, 0, 1)[None]
    logits = nn.functional.interpolate(model(pixel_values=pixels).logits, size=(64, 64), mode="bilinear")
    probabilities = predict_image(model, processor, image, 64, return_probabilities=True)[1]
    np.testing.assert_allclose(probabilities, logits.softmax(1)[0].detach().numpy(), atol=1e-5)

    with pytest.raises(UserError, match=r"5 bands \(red, green, blue, near_infrared, height\): pass .*5\), not uint8"):
        predict_image(model, processor, image[..., :3])
    with pytest.raises(UserError, match="a PIL image cannot hold"):
        predict_image(model, processor, Image.fromarray(image[..., :3]))
