"""The app of a Space: one model, one page."""

import json
import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path

# Read while gradio is imported: no reports to its makers, and no pictures of users in the storage of their browser.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}

import gradio as gr

from drd_hf.errors import UserError
from drd_hf.space import page
from drd_hf.space.images import thumbnail
from drd_hf.space.segment import MAX_PIXELS, Segmenter

MAX_FILE_SIZE = "200mb"
KEPT_MINUTES = 30
OPACITY = 60  # percent
SET_OPACITY = "(percent) => { document.documentElement.style.setProperty('--classes-opacity', percent / 100) }"
# On a phone the view is below what was tapped.
SHOW_VIEW = """() => {
    if (window.innerWidth < 700) document.querySelector('.drd-view').scrollIntoView({behavior: 'smooth'})
}"""
INVITATION = "Upload an aerial image, or pick an example."


def build(folder: str | Path) -> gr.Blocks:
    """The page of a Space, with its model loaded.

    Args:
        folder: that `write_space` has made.

    Raises:
        UserError: the model cannot be loaded, or is none that segments images.
    """
    folder = Path(folder)
    settings = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    segmenter = Segmenter(settings["model"])
    examples = [folder / name for name in settings["examples"]]

    def segment(path: str, name: str):
        """The view, the legend and the download of an image; what is wrong with it is said in the view."""
        with tempfile.TemporaryDirectory() as temporary:
            try:
                result = segmenter(path, Path(temporary))
            except UserError as error:
                blank = page.legend(segmenter.names, segmenter.colors)
                return page.problem(str(error)), blank, gr.DownloadButton(visible=False)
            output = Path(download.GRADIO_CACHE) / secrets.token_hex(16)  # gradio's folder, which it keeps clean
            output.mkdir(parents=True)
            file = shutil.move(result.file, output)
        kind = "GeoTIFF" if result.file.suffix == ".tif" else "PNG"
        return (
            page.view(name, result),
            page.legend(segmenter.names, segmenter.colors, result.shares),
            gr.DownloadButton(f"Download {kind}", value=str(file), visible=True),
        )

    def segment_upload(path: str, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        return (*segment(path, Path(path).name), None)  # the place for uploads is free for the next one

    def segment_example(event: gr.SelectData, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        return (*segment(str(examples[event.index]), f"Example {event.index + 1}"), gr.Gallery(selected_index=None))

    cleaning = (60, 60 * KEPT_MINUTES)
    with gr.Blocks(title=page.plain(settings["title"]), delete_cache=cleaning, fill_width=True) as demo:
        gr.HTML(
            page.header(
                settings["title"],
                settings["name"],
                settings["is_hub_id"],
                segmenter.num_parameters,
                segmenter.reads,
            ),
            elem_classes="drd",
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                upload = gr.File(
                    label="Image",
                    show_label=False,
                    file_types=[".png", ".jpg", ".jpeg", ".tif", ".tiff"],
                    height=140,
                    elem_classes="drd-upload",
                )
                gr.HTML(page.note(segmenter.reads, MAX_PIXELS, KEPT_MINUTES), elem_classes="drd")
                if examples:
                    gr.HTML("<h2>Examples</h2>", elem_classes="drd")
                    gallery = gr.Gallery(
                        [thumbnail(path) for path in examples],
                        label="Examples",
                        show_label=False,
                        allow_preview=False,
                        interactive=False,
                        buttons=[],
                        elem_classes="drd-examples",
                    )
            with gr.Column(scale=3, min_width=320):
                view = gr.HTML(page.invitation(INVITATION), elem_classes="drd drd-view")
                with gr.Row(equal_height=True):
                    opacity = gr.Slider(
                        0, 100, OPACITY, step=1, label="Opacity of the classes (%)", scale=3, buttons=[]
                    )
                    download = gr.DownloadButton("Download", visible=False, variant="primary", min_width=240)
                legend = gr.HTML(page.legend(segmenter.names, segmenter.colors), elem_classes="drd")
        opacity.input(None, opacity, js=SET_OPACITY)
        outputs = [view, legend, download]
        options = {"show_progress_on": view, "concurrency_id": "model", "concurrency_limit": 1}
        upload.upload(segment_upload, upload, [*outputs, upload], api_name="segment", **options)
        upload.upload(None, js=SHOW_VIEW)
        if examples:
            gallery.select(segment_example, None, [*outputs, gallery], api_visibility="private", **options)
            gallery.select(None, js=SHOW_VIEW)
    return demo.queue(max_size=20)


def serve(folder: str | Path) -> None:
    """Serve a Space until it is stopped; `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT` say where.

    Raises:
        UserError: see `build`; or no port is free.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the files of users go then, too
    with tempfile.TemporaryDirectory(prefix="drd-space-") as files:
        os.environ["GRADIO_TEMP_DIR"] = files
        try:
            build(folder).launch(
                theme=_theme(),
                css_paths=Path(__file__).with_name("style.css"),
                footer_links=["gradio", "settings"],
                max_file_size=MAX_FILE_SIZE,
                ssr_mode=False,
                share=False,
            )
        except OSError as error:
            raise UserError(f"the page cannot be served: {' '.join(str(error).split())}") from error


def _theme() -> gr.themes.Base:
    """Fonts of the system alone: others would be fetched from other hosts."""
    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_weight="400",
    )
