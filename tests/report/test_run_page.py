"""The page of a run, from all that its directory holds, or from what is left of it."""

import base64
import json

import cv2
import numpy as np
import pytest
import torch

from htmlpage import Page, check_page
from smalti.config import write_yaml
from smalti.data.images.folders import open_images
from smalti.errors import ConfigError, RunError, ShapeError
from smalti.evaluation.result import Baseline, Result, write_results
from smalti.methods.mae import MAE
from smalti.models.build import build_encoder
from smalti.report.patch_pictures import crop_images, patch_tokens
from smalti.report.run_page import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory, builder, encoder) -> Page:
    """A report with everything in it."""
    folder = tmp_path_factory.mktemp("report")
    path = write_report(builder(folder / "run", folder / "images"), encoder=encoder, num_images=4)
    assert path == folder / "run" / "report.html" and path.stat().st_size < 5 * 2**20
    found = Page(path)
    found.folder = folder
    return found


def test_the_page_needs_nothing_beside_it_and_every_picture_has_a_text(page):
    check_page(page.folder / "run" / "report.html")


def test_the_page_tells_the_run(page):
    for words in (
        "Better than the same network untrained: linear-segmentation miou on scenes is 0.314, against 0.207 (+0.107)",
        "2 of 2 evaluations improve",
        "optim.lr",
        "An example processor",
        "abc1234",
        "rolled back",
        "broken.jpg",
        "smalti train mae",
        "Effective rank",
    ):
        assert words in page.text


def test_the_data_of_the_page_gives_the_cosine_similarities(page, encoder):
    data = json.loads(page.data)
    images = open_images(page.folder / "images")
    arrays = {str(path.name): cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in images.paths}
    assert set(data["names"]) <= set(arrays) and len(data["names"]) == 4
    shown = crop_images(data["names"], [arrays[name] for name in data["names"]], (64, 64), 64)
    tokens, grid = patch_tokens(encoder, shown.inputs)
    assert data["grid"] == list(grid)
    flat = tokens.flatten(0, 1)
    flat = torch.nn.functional.normalize(flat - flat.mean(0), dim=-1)
    codes = np.frombuffer(base64.b64decode(data["encoders"][0]["codes"]), np.int8).reshape(len(flat), -1)
    codes = torch.nn.functional.normalize(torch.from_numpy(codes.astype(np.float32)), dim=-1)
    torch.testing.assert_close(codes @ codes.T, flat @ flat.T, atol=0.01, rtol=0)
    image, patch = data["start"]
    assert image < 4 and patch < grid[0] * grid[1]


def test_the_explorer_offers_attention_in_any_block(page, make_run, tmp_path):
    data = json.loads(page.data)["weights"]
    trained, baseline = data["encoders"]
    assert data["images"] == [0, 1, 2, 3] and (data["query_step"], data["key_step"]) == (1, 1)
    assert (trained["blocks"], trained["heads"], trained["class_token"]) == (2, 3, True) and baseline["blocks"] == 2
    assert "block" in page.attributes("id") and "class-token" in page.attributes("id")
    assert "Attention is that of the same patch" in page.text and "To keep the page small" not in page.text
    other = build_encoder("vit_tiny_patch16_224", img_size=64, seed=3, depth=2, embed_dim=30, num_heads=3).eval()
    other.vit.blocks[0].attn = _MeanMixer()
    path = write_report(make_run(), encoder=other, baseline=Baseline("untrained", lambda: other), num_images=2)
    without = check_page(path)
    assert json.loads(without.data)["weights"] is None and "block" not in without.attributes("id")
    assert "No attention: " in without.text and "Attention is that of" not in without.text


class _MeanMixer(torch.nn.Module):
    """Mixes tokens without attention."""

    def forward(self, tokens, **arguments):
        return tokens.mean(1, keepdim=True).expand_as(tokens)


def test_names_from_outside_stay_text(make_run, tmp_path, encoder):
    evil = "<script>alert(1)</script>"
    run = make_run(evil.replace("/", "|"), classes=(evil, '"><img src=x onerror=alert(1)>'), bad_name="<b>&.jpg")
    image = np.zeros((64, 64, 3), np.uint8)
    assert cv2.imwrite(str(tmp_path / "images" / "<img src=x onerror=alert(1)>.png"), image)
    page = Page(write_report(run, encoder=encoder, num_images=6))
    assert page.text.count(evil) >= 1
    assert sum(tag == "script" for tag, _ in page.elements) == 2  # the data and the page's own
    assert not page.attributes("onerror")
    assert "<img src=x onerror=alert(1)>.png" in json.loads(page.data)["names"]


def test_what_is_missing_is_left_out_and_said(tmp_path):
    run = tmp_path / "bare"
    write_yaml(run / "config.yaml", {"method": {"name": "mae"}, "data": {"path": str(tmp_path / "gone")}})
    page = Page(write_report(run))
    for words in ("Not evaluated", "No results yet", "No log.csv", "there is no encoder", "run.json is missing"):
        assert words in page.text
    assert not page.data


def test_a_run_without_an_encoder_is_not_asked_for_features(tmp_path):
    tokens = {"kind": "pca", "patch_size": 4}
    write_yaml(tmp_path / "config.yaml", {"method": {"name": "mar"}, "tokens": tokens, "data": {"path": "gone"}})
    page = Page(write_report(tmp_path))
    for words in ("mar on tokens of 4 px patches (pca)", "exports no encoder", f"smalti generate {tmp_path} num=64"):
        assert words in page.text
    assert "random ones" not in page.text and "Feature maps" not in page.text and not page.data


def test_images_that_are_gone_are_said_to_be(make_run, encoder, tmp_path):
    run = make_run()
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    page = Page(write_report(run, encoder=encoder))
    assert "none of 5 images tried can be read" in page.text and not page.data


def test_an_unreadable_image_gives_its_place_to_another(make_run, encoder, tmp_path):
    run = make_run()
    (tmp_path / "images" / "image_0.png").write_bytes(b"broken")
    names = json.loads(Page(write_report(run, encoder=encoder, num_images=4)).data)["names"]
    assert names == [f"image_{number}.png" for number in (1, 2, 3, 4)]


def test_tables_of_bytes_become_notes_of_the_page(make_run):
    run = make_run()
    for name in ("log.csv", "events.csv", "unreadable.csv"):
        (run / name).write_bytes(b"step\xff\x00\n1")
    (run / "run.json").write_text("[" * 100_000)
    (run / "probes").mkdir()
    (run / "probes" / "positions.json").write_text("[" * 100_000)
    (run / "results" / "evaluate_x.json").write_text('{"results": [{"protocol": "knn", "metrics": {"top1": "high"}}]}')
    text = Page(write_report(run, num_images=0)).text
    for name in ("log.csv", "events.csv", "unreadable.csv", "evaluate_x.json"):
        assert f"{name}: can't be read as a" in text
    assert "run.json is missing or damaged" in text


def test_damaged_results_and_a_cut_log_leave_the_rest(make_run):
    run = make_run()
    (run / "results" / "evaluate_other.json").write_text('{"results": [')
    with (run / "log.csv").open("a") as file:
        file.write("9999,1.0,0.0")
    page = Page(write_report(run, num_images=0))
    assert "evaluate_other.json: can't be read as a file of results" in page.text
    assert "200 / 200" in page.text and "No images were asked for" in page.text


def test_evaluations_in_training_alone_are_compared_with_the_baseline_at_the_start(make_run):
    run = make_run()
    (run / "results" / "evaluate_scenes.json").unlink()
    text = Page(write_report(run, num_images=0)).text
    assert "miou on scenes is 0.320, against 0.200 (+0.120)" in text and "during training, at step 200" in text


def test_one_channel_of_sixteen_bits_and_an_oblong_grid_are_shown(make_run, tmp_path):
    encoder = build_encoder("vit_tiny_patch16_224", img_size=(32, 64), in_chans=1, seed=0, depth=1, embed_dim=24)
    run = make_run()
    rng = np.random.default_rng(0)
    for path in (tmp_path / "images").iterdir():
        cv2.imwrite(str(path), rng.integers(0, 4000, (50, 70), dtype=np.uint16))
    page = Page(write_report(run, encoder=encoder, num_images=2, image_size=(32, 64)))
    assert json.loads(page.data)["grid"] == [2, 4]


def test_the_page_comes_out_the_same_twice(make_run, encoder, tmp_path):
    run = make_run()
    paths = [write_report(run, encoder=encoder, num_images=2, out=tmp_path / name) for name in ("a.html", "b.html")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_can_not_be_used_is_one_line(make_run, encoder, tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        write_report(tmp_path)
    run = make_run()
    with pytest.raises(ConfigError, match="is a folder, the report needs a file name"):
        write_report(run, out=tmp_path)
    with pytest.raises(ConfigError, match="num_images=-1"):
        write_report(run, num_images=-1)
    with pytest.raises(ShapeError, match="does not divide"):
        write_report(run, encoder=encoder, image_size=70)


def test_a_result_without_a_baseline_is_shown_and_not_judged(make_run):
    run = make_run(results=False)
    result = Result("knn", "run", "d", {"top1": 0.5}, {}, {}, {"accuracy": {"a": 0.9, "b": 0.1}})
    write_results(run / "results" / "evaluate_d.json", [result])
    text = Page(write_report(run, num_images=0)).text
    assert "No comparison with a baseline" in text and "accuracy of each class (2)" in text


def test_a_run_that_has_learned_nothing_says_so_first(make_run):
    run = make_run()
    info = json.loads((run / "run.json").read_text())
    sentence = "nothing learned: the position loss is 4.158 at the end, 0.0 % better than the uniform guess"
    (run / "run.json").write_text(json.dumps({**info, "reference": {"sentence": sentence}}))
    text = Page(write_report(run, num_images=0)).text
    assert text.index("Nothing learned: the position loss") < text.index("Better than the same network untrained")
    learned = "the position loss is 1 at the end; the uniform guess gets 4.158"
    (run / "run.json").write_text(json.dumps({**info, "reference": {"sentence": learned}}))
    text = Page(write_report(run, num_images=0)).text
    assert text.index("Better than the same network untrained") < text.index("The position loss is 1 at the end")


def test_a_constant_curve_is_left_out_and_its_value_is_said(make_run):
    run = make_run()
    rows = (run / "log.csv").read_text().splitlines()
    names = rows[0].split(",")
    place = names.index("weight_decay")
    changed = [[*cells[:place], "0.05", *cells[place + 1 :]] for cells in (row.split(",") for row in rows[1:])]
    (run / "log.csv").write_text("\n".join([rows[0], *(",".join(cells) for cells in changed)]) + "\n")
    page = Page(write_report(run, num_images=0))
    labels = page.attributes("aria-label")
    assert "Weight decay against the step" not in labels and "Learning rate against the step" in labels
    assert "Constant in all logged steps: Weight decay 0.05, Memory 1830." in page.text


def test_a_logged_value_is_drawn_with_its_meaning_and_listed_without_one(make_run):
    run = make_run()
    rows = (run / "log.csv").read_text().splitlines()
    added = [f"{row},{n / 7:.3f},{n}.25" for n, row in enumerate(rows[1:])]
    (run / "log.csv").write_text("\n".join([f"{rows[0]},mean_predictor_mse,<odd>", *added]) + "\n")
    page = Page(write_report(run, num_images=0))
    assert "Error of the mean patch against the step" in page.attributes("aria-label")
    assert MAE.log_columns["mean_predictor_mse"].meaning in page.text
    assert "Other logged values" in page.text and "<odd>" in page.text and "99.2" in page.text


def test_a_run_that_started_from_weights_says_so(tmp_path):
    write_yaml(
        tmp_path / "config.yaml", {"method": {"name": "mae"}, "init": "timm:vit@w.pth", "data": {"path": "gone"}}
    )
    assert "started from the weights of timm:vit@w.pth" in Page(write_report(tmp_path)).text


def test_a_protocol_draws_what_only_the_whole_run_shows(make_run):
    run = make_run()
    values = {0: (9.0, 0.9), 50: (1.0, 0.5), 100: (2.0, 0.4), 150: (4.0, 0.6), 200: (3.0, 0.5)}
    for step, (inner, dim) in values.items():
        metrics = {"dse": inner + dim, "m_inter": inner, "m_intra_image": 0.0, "m_intra_group": 0.0, "m_dim": dim}
        units = dict.fromkeys(metrics, "higher is better")
        found = Result("dense-structure", "x", "photos", metrics, units, {}, baseline=None if step else "untrained")
        write_results(run / "results" / f"step_{step:08d}.json", [found])
    text = Page(write_report(run, num_images=0)).text
    assert "DSE with the weight of the run" in text
    # std of 1, 2, 4, 3 over std of 0.5, 0.4, 0.6, 0.5; the untrained network does not count
    assert "M_inter - M_intra + 15.8 M_dim" in text and "Candidates, the best first: step 150." in text
