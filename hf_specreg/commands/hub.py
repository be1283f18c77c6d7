"""Commands that publish encoders and list what is published."""

from pathlib import Path
from typing import Literal

from hf_specreg.commands.listing import print_list


def card(
    folder: str,
    repo_id: str | None = None,
    report: str | None = None,
    baseline: str | None = None,
    license: str | None = None,
    study: str | None = None,
    output: str | None = None,
) -> None:
    """Write the model card of a saved encoder, README.md with its plots.

    Args:
        folder: of the saved model.
        repo_id: org/name, for the snippets; default: your-name/ and the folder's name.
        report: folder or robustness.json; default: the one in the folder, if there is one.
        baseline: a report of another model on the same images, to compare with.
        license: SPDX identifier, such as apache-2.0; default: the one on the card that is there.
        study: folder or study.json of the study that trained the encoder, for the card to cite.
        output: where the card is written; default: the folder.
    """
    from hf_specreg.hub.card import write_card
    from hf_specreg.hub.encoder import Encoder

    encoder = Encoder.open(folder, report=report, baseline=baseline, license=license, study=study)
    repo_id = repo_id or f"your-name/{Path(folder).resolve().name}"
    for path in write_card(encoder, repo_id, Path(output or folder)):
        print(path)


def push(
    folder: str,
    repo_id: str,
    report: str | None = None,
    baseline: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Publish encoder, report and card",
    eval_results: bool = True,
    notes: Literal["folder", "hub"] | None = None,
    study: str | None = None,
) -> None:
    """Publish a saved encoder with its report and card on the Hub, in one commit.

    The token is the one of `hf auth login`, or HF_TOKEN: it is no argument, so that no list of
    processes shows it. Of several processes the first publishes, and the others wait.

    Args:
        folder: of the saved model.
        repo_id: org/name, or name in your own namespace; made if it is not there.
        report: folder or robustness.json; default: the one in the folder, if there is one.
        baseline: a report of another model on the same images, to compare with.
        license: SPDX identifier, such as apache-2.0; default: the one on the card that is there.
        private: make the repository private.
        revision: branch; default: main.
        create_pr: open a pull request instead of committing.
        commit_message: of the commit.
        eval_results: write .eval_results/hf_specreg.yaml where the data set is on the Hub.
        notes: which to keep where those on the folder's card and on the Hub's differ.
        study: folder or study.json of the study that trained the encoder, for the card to cite.
    """
    from hf_specreg.hub import publish
    from hf_specreg.recipes.launched import launched

    state = launched()
    pushed = publish.push(
        folder,
        repo_id,
        report=report,
        baseline=baseline,
        license=license,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        eval_results=eval_results,
        notes=notes,
        study=study,
    )
    if pushed is not None:
        what = pushed.pull_request or ("published" if pushed.changed else "nothing has changed")
        print(f"{pushed.repo_id} at {pushed.commit}: {what}")
    state.wait_for_everyone()


def list_encoders(source: str, sort: str = "accuracy", html: str | None = None) -> None:
    """List encoders with their accuracy and robustness, by the metadata on their cards.

    Args:
        source: a folder that holds encoders' folders, or a namespace or a collection on the Hub.
        sort: a column's name; the largest first. A robust accuracy or a mean distance of this name
            is the one that is shown.
        html: also write a page to sort and to filter into this file.
    """
    from hf_specreg.hub.catalogue import write_catalogue
    from hf_specreg.hub.collection import collect

    rows = collect(source)
    if html:
        write_catalogue(html, rows, source, sort=sort)
    if not rows:
        print(f"no encoders of hf_specreg in {source}")
        return
    print_list(rows, source, sort)
    if html:
        print(html)


def publish_zoo(
    folder: str,
    namespace: str,
    title: str = "Encoders of hf_specreg",
    license: str | None = None,
    private: bool = False,
) -> None:
    """Publish the encoders of a folder with their cards and reports, in one collection on the Hub.

    The same command goes on where it was stopped; what is there already is not sent again.

    Args:
        folder: that holds zoo.yaml, or the folders of saved encoders with their cards.
        namespace: a user or an organisation.
        title: of the collection.
        license: SPDX identifier, of those that state none; default: the ones on their cards.
        private: make the repositories and the collection private.
    """
    from hf_specreg.hub import zoo
    from hf_specreg.recipes.launched import launched

    state = launched()
    done = zoo.publish_zoo(folder, namespace, title=title, license=license, private=private)
    if done is not None:
        for pushed in done.pushed:
            print(f"{pushed.repo_id}: {'published' if pushed.changed else 'nothing has changed'}")
        print(done.collection)
    state.wait_for_everyone()


def space(
    folder: str,
    output: str = "runs/space",
    repo_id: str | None = None,
    license: str | None = None,
    requirement: str | None = None,
) -> None:
    """Write a Space for an encoder: an app in gradio that attacks a picture that is uploaded.

    Args:
        folder: of the saved encoder.
        output: the Space's folder, to be sent by `hf upload ID OUTPUT --repo-type space`.
        repo_id: org/name where the encoder is published; default: it is copied into the Space.
        license: SPDX identifier, such as apache-2.0; default: the encoder's.
        requirement: the line of requirements.txt that installs hf_specreg with the extra attacks.
    """
    from hf_specreg.hub.space import write_space

    given = {"repo_id": repo_id, "license": license, "requirement": requirement}
    for path in write_space(folder, output, **given):
        print(path)
    if requirement is None:
        print(
            "requirements.txt does not install hf_specreg yet: say --requirement, or add the line"
        )
