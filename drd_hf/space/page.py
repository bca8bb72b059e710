"""What the page of a Space shows, as HTML. Everything that comes from a user goes through `_text`."""

import html
from collections.abc import Sequence

from drd_hf.space.segment import Segmentation, data_uri


def header(title: str, model: str, is_hub_id: bool, num_parameters: int, reads: str) -> str:
    """Title, and one line about the model."""
    name = _text(model)
    if is_hub_id:
        name = f'<a href="https://huggingface.co/{name}" target="_blank" rel="noopener">{name}</a>'
    facts = [name, f"{_short_count(num_parameters)} parameters", _text(reads)]
    return f'<h1>{_text(title)}</h1><p class="facts">{" · ".join(facts)}</p>'


def note(reads: str, max_pixels: int, minutes: int) -> str:
    """What may be uploaded, and what becomes of it."""
    return (
        f'<p class="note">PNG, JPEG, TIFF or GeoTIFF with {_text(reads)} of 8 bits, up to {max_pixels / 1e6:.0f} million '
        f"pixels. A GeoTIFF stays a GeoTIFF. Uploads and class maps are deleted after {minutes} minutes.</p>"
    )


def invitation(message: str) -> str:
    """An empty view."""
    return f'<div class="view empty"><p>{_text(message)}</p></div>'


def problem(message: str) -> str:
    """A view that says what is wrong with the image."""
    return f'<div class="view empty problem" role="alert"><p>{_text(message)}</p></div>'


def view(name: str, result: Segmentation) -> str:
    """The image, and over it the map, whose opacity is the page's to set."""
    facts = [_text(name), f"{result.width:,} × {result.height:,} pixels"]
    facts += [_text(result.crs)] if result.crs else []
    facts += [f"{_percent(result.no_data)} without data"] if result.no_data else []
    return (
        '<figure class="view"><div class="stack">'
        f'<img class="image" src="{data_uri(result.image)}" alt="Image">'
        f'<img class="classes" src="{data_uri(result.classes)}" alt="Its classes">'
        f"</div><figcaption>{' · '.join(facts)}</figcaption></figure>"
    )


def legend(names: Sequence[str], colors: Sequence[tuple[int, int, int]], shares: Sequence[float] | None = None) -> str:
    """Colours and names of the classes; with their shares, the largest first."""
    order = range(len(names)) if shares is None else sorted(range(len(names)), key=lambda i: -shares[i])
    rows = []
    for i in order:
        color = "rgb({}, {}, {})".format(*map(int, colors[i]))
        share = ""
        if shares is not None:
            share = (
                f'<span class="share">{_percent(shares[i])}</span>'
                f'<span class="bar"><span style="width: {shares[i]:.2%}; background: {color}"></span></span>'
            )
        name = _text(names[i])
        rows.append(
            f'<li><span class="swatch" style="background: {color}"></span><span class="name" title="{name}">{name}</span>{share}</li>'
        )
    return f'<ul class="legend">{"".join(rows)}</ul>'


def plain(title: str) -> str:
    """A title for where markup cannot be escaped."""
    return " ".join("".join(sign for sign in title if sign not in "<>&\"'`").split())


def _text(value: object) -> str:
    return html.escape(" ".join(str(value).split()))


def _percent(share: float) -> str:
    return "&lt;0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _short_count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)
