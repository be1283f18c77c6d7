"""The snippets of README.md and docs/ run as they stand, and what the pages name is there."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
import yaml
from accelerate import Accelerator
from torch import nn

import hf_specreg
from hf_specreg import SpecRegModel, SpectralPenalty, __version__
from hf_specreg.data.datasets import load_splits
from hf_specreg.data.images import LabelledImages
from hf_specreg.data.transforms import evaluation_transform
from tests.pages import PAGES, README, ROOT, only, page, snippets

FOLDERS = ("hf_specreg", "recipes", "benchmarks", "tests", "docs", "model_cards", ".github")
FILES = [str(file) for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")]
FILES += [str(file) for file in ROOT.glob("*.*")]
NOT_OF_THE_REPOSITORY = {
    "mine.yaml",
    "ssl.py",
    "app.py",
    ".eval_results/hf_specreg.yaml",
    "hf_specreg/robustness/attacks/NAME.py",
    "hf_specreg/spectral/regularizers/NAME.py",
    "train.py",
    "specreg_train.py",
    "run_image_classification.py",
    "specreg_run.py",
}

HERE, STOCK = "tests/test_docs.py", "tests/test_stock_scripts.py"
# The test that runs each Python snippet of a page, in order.
RUN_BY = {
    "README.md": [f"{HERE}::test_three_lines_make_an_encoder_harder_to_attack"],
    "penalty.md": [
        f"{HERE}::test_the_feature_space_is_as_shown",
        f"{HERE}::test_the_trainer_is_a_drop_in",
        f"{HERE}::test_the_penalty_enters_a_step_once_however_many_micro_batches_it_has",
    ],
    "norms.md": [
        f"{HERE}::test_batch_norms_are_pinned_and_fused_as_shown",
        f"{HERE}::test_of_an_encoder_without_norms_all_maps_are_penalised_and_none_has_a_free_scale",
    ],
    "regularizers.md": [
        *[f"{HERE}::test_a_penalty_on_the_function_is_added_to_a_loss"] * 2,
        f"{HERE}::test_a_part_of_a_batch_is_made_adversarial",
    ],
    "robustness.md": [f"{HERE}::test_the_evaluation_runs_as_shown"],
    "stock-scripts.md": [
        f"{STOCK}::test_timms_train_script_has_a_term",
        f"{STOCK}::test_a_task_has_the_penalty_and_a_regularizer",
        f"{STOCK}::test_transformers_script_fine_tunes_what_is_saved_and_resumes",
        f"{STOCK}::test_a_trainer_has_a_regularizer_of_images",
        f"{STOCK}::test_a_trainer_moves_the_first_images_of_a_batch",
        f"{STOCK}::test_a_callback_adds_the_penalty_to_a_trainer_and_its_reporters",
        f"{STOCK}::test_a_trainer_has_a_regularizer_of_images",
        f"{STOCK}::test_a_callback_adds_the_penalty_to_a_trainer_and_its_reporters",
        f"{STOCK}::test_lightning_adds_it_once_a_step_and_keeps_its_state",
        f"{STOCK}::test_a_module_of_lightning_has_a_regularizer_of_images",
        f"{STOCK}::test_a_loop_of_lightly_has_it_on_the_backbone",
    ],
    "hub.md": [
        f"{HERE}::test_what_is_saved_loads_as_shown",
        f"{HERE}::test_what_is_saved_loads_as_shown",
        "tests/hub/test_snippets.py::test_from_an_encoder_on_the_hub_to_one_of_your_own",
    ],
    "scale.md": [
        "tests/spectral/test_sharding.py::test_a_sharded_loop_is_that_of_whole_weights_and_resumes"
    ]
    * 3,
    "zoo.md": ["tests/hub/test_notebook.py::test_a_picture_is_attacked_as_shown"],
}


def test_three_lines_make_an_encoder_harder_to_attack():
    torch.manual_seed(0)
    (snippet,) = snippets(README.read_text())
    of_norms, of_none = snippet.split("# For networks without norms")
    model, seen = timm.create_model("test_resnet", num_classes=5), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10) % 5
    names = {"model": model, "criterion": F.cross_entropy, "images": images, "labels": labels}
    exec(of_norms, names)
    names["loss"].backward()
    assert (seen[-1] != images).flatten(1).any(1).tolist() == [True] * 8 + [False] * 2
    assert model.conv1[0].weight.grad.any()
    plain = timm.create_model("resnet20_cifar_fixup", num_classes=5)
    names |= {"without_norms": plain, "criterion": lambda logits, labels: 0 * logits.sum()}
    exec(f"#{of_none}", names)
    names["loss"].backward()
    assert plain.stages[0][0].conv1.weight.grad.any()
    assert names["spectral"].step == 1
    assert names["spectral"].free_scale == ()


@pytest.mark.parametrize(
    ("penalty", "name"),
    [("SensitivityPenalty", "sensitivity"), ("InputGradientPenalty", "gradient")],
)
def test_a_penalty_on_the_function_is_added_to_a_loss(penalty, name):
    torch.manual_seed(0)
    snippet = only(page("regularizers"), penalty)
    model = timm.create_model("test_vit", img_size=32, num_classes=5)
    names = {
        "model": model,
        "criterion": lambda logits, labels: 0 * logits.sum(),
        "images": torch.rand(16, 3, 32, 32),
        "labels": torch.arange(16) % 5,
    }
    exec(snippet, names)
    names["loss"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert names[name].step == 1


def test_a_part_of_a_batch_is_made_adversarial():
    torch.manual_seed(0)
    model, seen = timm.create_model("test_vit", img_size=32, num_classes=5), []
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 5
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    names = {"model": model, "criterion": F.cross_entropy, "images": images, "labels": labels}
    exec(only(page("regularizers"), "AdversarialImages"), names)
    names["loss"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    moved = (seen[-1] != images).flatten(1).any(1)
    assert moved.tolist() == [True] * 8 + [False] * 12


@pytest.mark.parametrize("name", ["vit", "convnext", "bare_vit", "bare_convnext"])
def test_of_an_encoder_without_norms_all_maps_are_penalised_and_none_has_a_free_scale(name):
    snippet = only(page("norms"), "dynamictanh")
    names = {"timm": timm}
    exec(snippet, names)
    model = names[name]
    penalty = SpectralPenalty(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    of_stacks = 2 * sum(n.endswith("qkv") for n in layers)
    assert len(penalty.layers) == len(layers) - 1 + of_stacks  # but for the head
    assert penalty.free_scale == ()
    kinds = [type(m).__name__ for m in model.modules()]
    has_tanh = any(kind.startswith("DynamicTanh") for kind in kinds)
    assert has_tanh == (not name.startswith("bare"))
    assert not [kind for kind in kinds if kind.startswith(("LayerNorm", "BatchNorm"))]
    if name == "bare_convnext":
        scales = [p for n, p in model.named_parameters() if n.endswith("gamma")]
        assert scales
        assert all(scale.max() < 1e-5 for scale in scales)


@pytest.mark.parametrize("name", ["resmlp_12_224", "nf_resnet26", "nf_regnet_b0", "vgg11"])
def test_timms_encoders_without_norms_are_as_said(name):
    assert f"`{name}`" in page("norms")
    with torch.device("meta"):
        penalties = [
            SpectralPenalty(timm.create_model(n, num_classes=5)) for n in (name, "vgg11_bn")
        ]
    assert [len(penalty.free_scale) for penalty in penalties] == [0, 8]


def test_the_feature_space_is_as_shown():
    torch.manual_seed(0)
    names = {
        "model": timm.create_model("test_resnet", num_classes=5).eval(),
        "images": torch.rand(2, 3, 160, 160),
        "SpectralPenalty": SpectralPenalty,
    }
    exec(only(page("penalty"), "FeatureSpace"), names)
    torch.testing.assert_close(names["model"].fc(names["features"]), names["logits"])
    assert {layer.name for layer in names["penalty"].layers} < set(names["names"])
    assert "fc" not in names["names"]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_penalty_enters_a_step_once_however_many_micro_batches_it_has(micro_batches):
    snippet = only(page("penalty"), "accumulate")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    names = {
        "model": model,
        "accelerator": accelerator,
        "criterion": lambda logits, labels: 0 * logits.sum(),
        "images": torch.rand(2, 3, 2, 2),
        "labels": None,
        "penalty": SpectralPenalty(model, strength=0.5, head="2", input_size=(3, 2, 2)),
    }
    for _ in range(micro_batches):
        exec(snippet, names)
    assert names["penalty"].step == 1
    u, sigma, v = torch.linalg.svd(model[1].weight.detach(), full_matrices=False)
    expected = 0.5 * 2 * sigma[0] * u[:, :1] @ v[:1]
    torch.testing.assert_close(model[1].weight.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_trainer_is_a_drop_in(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    names = {
        "model": transformers.ViTForImageClassification(config),
        "args": transformers.TrainingArguments(
            str(tmp_path), max_steps=1, use_cpu=True, report_to="none", remove_unused_columns=False
        ),
        "images": [{"pixel_values": torch.rand(3, 8, 8), "labels": 1}] * 8,
    }
    snippet = only(page("penalty"), "SpecRegTrainer")
    exec(snippet, names)
    names["trainer"].train()
    assert names["trainer"].penalty.step == 1
    assert names["trainer"].penalty.strength == 1e-2


def test_what_is_saved_loads_as_shown(tmp_path):
    torch.manual_seed(0)
    saved = SpecRegModel.from_timm("resnet10t", num_classes=3, input_size=(3, 64, 64))
    saved.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64)
    names = {"images": images, "timm": timm, "transformers": transformers}
    for snippet in snippets(page("hub"))[:2]:
        exec(snippet.replace("runs/digits/model", str(tmp_path)), names)
    assert names["model"].num_classes == 3
    assert names["tuned"].num_classes == 5
    head = names["model"].network.get_classifier()
    names["model"].eval()
    features = names["model"].features(images)
    torch.testing.assert_close(head(features), names["model"](images))


def test_batch_norms_are_pinned_and_fused_as_shown():
    snippet = only(page("norms"), "fuse_norms")
    names = {name: timm.create_model("test_resnet") for name in ("model", "fresh", "pretrained")}
    exec(snippet, names)
    assert {"bn1", "layer1.0.bn1"} <= set(names["names"])
    for name in ("model", "fresh", "pretrained"):
        assert not names[name].train().bn1.training


def test_the_evaluation_runs_as_shown(tmp_path):
    torch.manual_seed(0)
    model = SpecRegModel.from_timm("mlp_2000", input_size=(1, 8, 8), img_size=8, hidden_features=64)
    rows = load_splits("digits").train
    size = (1, 8, 8)
    digits = LabelledImages(rows, input_size=size, evaluate=evaluation_transform(size))
    images, labels = digits.__getitems__(list(range(len(digits))))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images / 255), labels).backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "model")
    snippet = only(page("robustness"), "evaluate_robustness")
    names = {}
    quick = snippet.replace("samples=50", "samples=10")
    assert quick != snippet
    exec(quick.replace("runs/digits", str(tmp_path)), names)
    assert names["report"].content["clean"]["accuracy"]["value"] > 0.7
    assert names["report"].content["n"] == 10
    assert (tmp_path / "robustness.json").exists()
    assert "How robust is" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_snippet_of_a_page_is_run_by_a_test(path):
    tests = RUN_BY.get(path.name, [])
    assert len(snippets(path.read_text("utf-8"))) == len(tests)
    for test in tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text("utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_is_there(path):
    text = path.read_text("utf-8")
    links = re.findall(r"\]\(([^)#\s]+)|^\[[\w-]+\]: (\S+)", text, re.MULTILINE)
    for target in (inline or defined for inline, defined in links):
        if not target.startswith("https://"):
            found = (path.parent / target).resolve()
            assert found.exists(), target
            if path.parent != ROOT:  # the site holds nothing from elsewhere
                assert found.is_relative_to(ROOT / "docs"), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_files_that_a_page_names_are_there(path):
    """By their whole path, or its end where a row of a table has named the folder."""
    named = re.findall(r"[\w./-]+\.(?:py|yaml|yml|jinja|cff)\b", path.read_text("utf-8"))
    missing = {name for name in named if not any(file.endswith(f"/{name}") for file in FILES)}
    assert missing <= NOT_OF_THE_REPOSITORY


def test_the_site_begins_with_the_readme_and_leads_to_the_same_pages():
    """README.md and docs/index.md, which takes its text, each say where its links lead."""
    links = [
        dict(re.findall(r"^\[([\w-]+)\]: (\S+)", text.read_text("utf-8"), re.MULTILINE))
        for text in (README, ROOT / "docs/index.md")
    ]
    readme, index = links
    assert readme == {name: f"docs/{target}" for name, target in index.items()}
    used = re.findall(r"\]\[([\w-]+)\]|\[([\w-]+)\]\[\]", README.read_text("utf-8"))
    assert {a or b for a, b in used} == set(readme)


def test_every_page_is_in_the_sites_navigation():
    named = re.findall(r"- ([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text("utf-8"))
    docs = ROOT / "docs"
    assert sorted(named) == sorted(str(p.relative_to(docs)) for p in docs.rglob("*.md"))


def test_the_readme_is_short_and_its_first_table_has_numbers_that_were_measured():
    text = README.read_text("utf-8")
    assert len(text.split()) < 2500
    table = text[text.index("| network, data |") :].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert 1 <= len(rows) <= 8
    measured = page("results") + text[text.index("## Measured") :]
    for number in re.findall(r"[-+]?\d+\.\d+ (?:points )?\([^)]*\)|\d\.\d{3}", table):
        assert number in measured, number


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert "arXiv:2405.17181" in str(citation["references"])


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: hf_specreg\.(\w+)$", page("reference/public"), re.MULTILINE)
    assert sorted(named) == sorted(hf_specreg.__all__)
