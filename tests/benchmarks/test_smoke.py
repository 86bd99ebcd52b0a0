"""The benchmarks at tiny sizes: what they measure is what they say."""

import io
import json
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.common.cases import LayerShape, build_case, layer_shapes, predictive_flop
from benchmarks.common.fits import METHODS
from benchmarks.common.models import CifarResNet20, freeze_batch_norm, load_images
from benchmarks.common.posteriors import OurPosterior, ReferencePosterior
from benchmarks.common.predictive_report import Prediction, growth
from benchmarks.common.tables import Summary, ratio, table
from benchmarks.common.worker import measured, serve
from benchmarks.common.workers import Limits, Measurement, NoResult, Worker
from benchmarks.predictive import _checked_points
from tests.benchmarks.subjects import Subject


def _summary(cpu):
    return Summary(cpu, cpu, 1.0, 0.1, 1)


def _tiny_case(dtype=torch.float64):
    case = build_case("last3", n_fit=12, n_validation=1)
    inputs = torch.randn(12, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype).eval()
    return replace(case, model=model, fit_data=(inputs, case.fit_data[1]))


@pytest.mark.parametrize("name", ["mlp", "last3"])
def test_both_libraries_predict_the_same_in_double_precision(name):
    case = build_case(name, n_fit=16, n_validation=8)
    data = {
        part: (getattr(case, part)[0].double(), getattr(case, part)[1])
        for part in ("fit_data", "validation")
    }
    case = replace(case, model=case.model.double(), **data)
    ours, reference = (
        kind(case).predict(8)["probabilities"] for kind in (OurPosterior, ReferencePosterior)
    )
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_grid_search_agrees_with_brute_force():
    subject = OurPosterior(build_case("mlp", n_fit=32, n_validation=30))
    found = subject.grid_search(batch=15, images=30, points=9)
    priors = [*found["prior_precisions"], found["prior_precision"]]
    *losses, refined = subject.fresh_losses(priors, batch=16, images=30)["losses"]
    assert found["losses"] == pytest.approx(losses, rel=1e-4)
    assert found["best_grid_point"] == found["prior_precisions"][int(np.argmin(losses))]
    assert refined <= min(losses) + 1e-6


def test_methods_that_compute_the_same_matrix_have_the_same_trace():
    case = _tiny_case()
    trace = {name: method(case, 8) for name, method in METHODS.items()}
    assert trace["ours, single, kfac"] == pytest.approx(
        trace["laplace-torch KronLaplace"], rel=1e-4
    )
    assert trace["ours, single, ggn"] == pytest.approx(trace["curvlinops EKFAC"], rel=1e-8)
    assert trace["ours, two_batch, kfac"] != pytest.approx(trace["ours, single, kfac"], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "limits", "reason"),
    [
        ("fill", Limits(600.0, 0.2), "out of memory (> 0.2 GB)"),
        ("hang", Limits(0.3, 10.0), "no result in 0.3 s"),
    ],
)
def test_a_worker_answers_reports_failures_and_is_stopped_at_its_limits(method, limits, reason):
    with Worker("tests.benchmarks.subjects:Subject", 1, limits) as worker:
        worker.prepare()
        with pytest.raises(NoResult, match="ValueError: no"):
            worker.call_untimed("fail")
        assert worker.call_untimed("answer", value=3).values == {"value": 3}
        for name in (method, "answer"):
            with pytest.raises(NoResult, match=re.escape(reason)):
                worker.call(name)
        assert worker.stopped == reason


def test_peak_memory_counts_the_call_and_not_what_was_before():
    def fill():
        return {"size": len(bytearray(b"x" * 60_000_000))}

    call = Measurement(**measured(fill))
    assert call.rss_peak_bytes - call.rss_before_bytes > 50_000_000
    again = Measurement(**measured(dict))
    assert again.rss_peak_bytes - again.rss_before_bytes < 30_000_000


def test_server_survives_a_failing_call():
    requests = [
        {"method": method, "arguments": {}} for method in ("prepare", "fail", "nothing", "quit")
    ]
    replies = io.StringIO()
    serve(Subject, io.StringIO("\n".join(map(json.dumps, requests))), replies)
    kinds = [set(json.loads(line)) for line in replies.getvalue().splitlines()]
    assert kinds[0] >= {"wall_s", "cpu_s", "values"}
    assert kinds[1:] == [{"error"}, {"error"}]


def test_resnet20_has_the_published_shapes_and_leaves_batch_norm_out():
    model = freeze_batch_norm(CifarResNet20().eval())
    shapes = layer_shapes(model, torch.zeros(1, 3, 32, 32))
    assert shapes[0] == LayerShape(1024, 16, 27)
    assert shapes[-1] == LayerShape(1, 10, 64)
    assert sum(shape.size for shape in shapes) == pytest.approx(40.6e6, rel=0.01)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(
        p.numel()
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
        for p in m.parameters()
    )


def test_work_of_a_last_layer_needs_no_jacobian():
    last, full = (predictive_flop(build_case(name, 2, 2)) for name in ("last100", "mlp"))
    assert last == 2 * (32 * 512 + 512 * 100 + 512**2 + 512 * 100 + 100**2)
    assert full > 2 * 11 * (64 * 128 + 128 * 128 + 128 * 10)


def test_images_load_alike_from_folder_and_zip(tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for label, value in (("b", 255), ("a", 0)):
            name = tmp_path / "set" / "test" / label / "1.png"
            name.parent.mkdir(parents=True)
            Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(name)
            target.write(name, f"set/test/{label}/1.png")
    for path in (tmp_path / "set", archive):
        images, labels = load_images(path, "test")
        assert labels.tolist() == [0, 1]
        torch.testing.assert_close(images[0, 0, 0, 0], torch.tensor(-0.485 / 0.229))
    with pytest.raises(ValueError, match="holds no images"):
        load_images(archive, "train")


def test_brute_force_checks_the_best_point_its_neighbours_and_a_spread():
    grid = [float(k) for k in range(100)]
    checked = _checked_points(grid, 40.0, 15)
    assert len(checked) == 15
    assert {38.0, 39.0, 40.0, 41.0, 42.0, 0.0} <= set(checked)
    assert _checked_points(grid, 0.0, 100) == grid


def test_growth_is_the_exponent_of_the_batch_size():
    rows = [
        Prediction("x", batch, _summary(0.1 * batch**2), Summary(), None, None)
        for batch in (2, 4, 8, 16)
    ]
    assert growth(rows) == pytest.approx(2.0)


def test_tables_show_failures_instead_of_figures():
    failed = Summary.of([], "out of memory (> 10 GB)")
    assert failed.time_cell() == "out of memory (> 10 GB)"
    assert ratio(failed.wall_s, 1.0) == "–"
    assert table(["a", "b"], [["1", "2"]]).splitlines()[-1] == "| 1 | 2 |"
