"""A Space of the Hub for one encoder: an app in gradio, which is the Space's dependency, not ours.

The app is space.py.jinja, beside this file; what it computes is `hf_specreg.robustness.nearest`.
"""

import shutil
from pathlib import Path

import jinja2
import yaml

from hf_specreg.encoders.download import LOADED_FILES, RUN_FILE
from hf_specreg.hub.encoder import CardError, Encoder

GRADIO = "6.31.0"  # that the app was tried with
UNKNOWN = (
    "# hf_specreg with the extra attacks: a line that pip takes, such as its repository's address\n"
)
ABOUT = """\
Upload a picture, slide eps: what {title} takes it for, the nearest adversarial image that FMN
finds, and the difference magnified. Written by `hf-specreg space`.
"""


def write_space(
    folder: str | Path,
    output: str | Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    requirement: str | None = None,
) -> list[Path]:
    """Write app.py, requirements.txt and README.md; without a repo_id the encoder too, in model/.

    Args:
        folder: of a saved encoder with a head.
        output: the Space's folder.
        repo_id: "org/name" where the encoder is published, for the app to load it from there.
        license: SPDX identifier of the Space; default: the encoder's.
        requirement: the line of requirements.txt that installs hf_specreg with the extra attacks;
            default: a comment that it is missing.

    Returns:
        The paths of what was written.

    Raises:
        CardError: the encoder has no head.
        FolderError: a file of the folder is damaged.
    """
    encoder, output = Encoder.open(folder, license=license), Path(output)
    if not encoder.model.num_classes:
        raise CardError(f"{folder} has no head: a Space shows what a classifier takes images for")
    place = Path(folder).resolve()
    place = place.parent if place.name == "model" else place  # of a run, where all have this name
    title = (repo_id or place.name).split("/")[-1]
    files = _texts(encoder, title, repo_id, requirement)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in files.items():
        (output / name).write_text(text, "utf-8")
        written.append(output / name)
    if repo_id is None:
        (output / "model").mkdir(exist_ok=True)
        for name in LOADED_FILES:
            if name != RUN_FILE and (encoder.folder / name).is_file():
                written.append(Path(shutil.copy(encoder.folder / name, output / "model" / name)))
        written.append(output / "model" / RUN_FILE)
        written[-1].write_bytes(encoder.run_bytes)
    return written


def _texts(
    encoder: Encoder, title: str, repo_id: str | None, requirement: str | None
) -> dict[str, str]:
    """Return the text of each file by its name."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True
    )
    environment.filters["repr"] = repr
    app = environment.get_template("space.py.jinja").render(
        model=repo_id or "model", title=title, largest=_largest(encoder)
    )
    about = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "pinned": False,
        "tags": ["hf-specreg", "adversarial-robustness"],
        **({"license": encoder.license} if encoder.license else {}),
        **({"models": [repo_id]} if repo_id else {}),
    }
    front = yaml.safe_dump(about, sort_keys=False)
    return {
        "app.py": app,
        "requirements.txt": f"{requirement}\n" if requirement else UNKNOWN,
        "README.md": f"---\n{front}---\n\n# {title}\n\n{ABOUT.format(title=title)}",
    }


def _largest(encoder: Encoder) -> float:
    """The end of the slider: twice the largest L2 eps of the report, or 2."""
    points = encoder.report.content["worst_case"] if encoder.report else []
    return 2 * max([p["eps"] for p in points if p["norm"] == "l2"], default=1.0)
