"""Scores of known features against closed forms, and the notes where there are too few images for a score."""

import json

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation import features, metrics
from evaluation.features import Measured
from util.errors import UserError


def measured(pool: torch.Tensor, seed: int = 0) -> Measured:
    logits = torch.randn(len(pool), 5, generator=torch.Generator().manual_seed(seed))
    return Measured(*features.gaussian(pool), pool, logits, {"images": len(pool)})


def reference(pool: torch.Tensor, with_images: bool = True) -> Measured:
    about = {"images": len(pool), "path": "some.npz"}
    return Measured(*features.gaussian(pool), pool if with_images else None, None, about)


def normal(count: int, dim: int = 8, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return shift + scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("space", features.SPACES.values(), ids=features.SPACES)
def test_the_distance_of_two_gaussians_is_the_closed_form(space):
    rng = np.random.default_rng(0)
    (mu_a, mu_b), (a, b) = rng.normal(size=(2, 6)), rng.normal(size=(2, 6, 6))
    a, b = a @ a.T, b @ b.T
    generated = measured(normal(50, 6))
    generated.mu, generated.sigma = mu_a, a
    scores, _, _ = metrics.compute(generated, Measured(mu_b, b, None, None, {"path": "x"}), space)
    root = sqrtm(a)
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(a + b - 2 * sqrtm(root @ b @ root).real)
    assert scores[space.distance] == pytest.approx(expected, rel=1e-9)
    assert (
        ("fid" in scores)
        == ("inception_score" in scores)
        == ("kid" in scores)
        == (space is features.INCEPTION)
    )


def test_a_set_against_itself_and_against_one_far_away():
    pool = normal(400)
    same, _, _ = metrics.compute(measured(pool), reference(pool))
    assert abs(same["fid"]) < 1e-6
    assert (same["precision"], same["recall"]) == (1, 1)
    far, _, _ = metrics.compute(measured(pool), reference(pool + 100))
    assert far["fid"] == pytest.approx(8 * 100**2, rel=1e-5)
    assert (far["precision"], far["recall"]) == (0, 0)
    assert far["kid"] > 1


def test_precision_is_of_the_generated_and_recall_of_the_real():
    """The generated images cover one of the two clusters of real ones: high precision, recall of one half."""
    here, there = normal(200), normal(200, seed=1, shift=1000.0)
    scores, _, _ = metrics.compute(
        measured(normal(200, seed=2, scale=0.5)), reference(torch.cat([here, there]))
    )
    assert scores["precision"] > 0.95
    assert 0.05 < scores["recall"] <= 0.5


def test_inception_score_of_known_logits():
    """Certain logits, all 4 classes equally often: the score is 4. The same logits for all images: it is 1."""
    generated = measured(normal(4000))
    generated.logits = 100 * torch.eye(4)[torch.arange(4000) % 4]
    scores, _, _ = metrics.compute(generated, None)
    assert scores["inception_score"] == pytest.approx(4, rel=0.01)
    assert scores["inception_score_std"] < 0.02
    generated.logits = torch.ones(4000, 4)
    assert metrics.compute(generated, None)[0]["inception_score"] == pytest.approx(1)


def test_few_images_are_scored_as_far_as_they_go_and_it_is_said():
    scores, settings, notes = metrics.compute(measured(normal(7)), reference(normal(5)))
    assert (settings["isc_splits"], settings["kid_subset_size"], settings["prc_neighborhood"]) == (1, 5, 3)
    assert None not in scores.values()
    assert [note.split(":")[0] for note in notes] == ["IS", "KID", "FID"]
    scores, settings, notes = metrics.compute(measured(normal(7)), reference(normal(3)))
    assert (scores["precision"], scores["recall"]) == (None, None)
    assert scores["kid"] is not None
    assert "prc_neighborhood" not in settings
    assert "precision and recall: not computed, 3 images have no third neighbour" in notes
    assert metrics.adapt_settings(measured(normal(1100)), reference(normal(1200))) == (metrics.SETTINGS, [])


def test_an_inception_score_is_never_of_single_images():
    few = measured(normal(19))
    scores, settings, notes = metrics.compute(few, None)
    assert settings["isc_splits"] == 1
    assert scores["inception_score"] > 1.1
    assert notes[0].startswith("IS: of all 19 images")
    assert metrics.adapt_settings(measured(normal(20)), None)[0]["isc_splits"] == 10


def test_a_reference_without_images_gives_fid_and_is_and_says_why_no_more():
    scores, settings, notes = metrics.compute(measured(normal(50)), reference(normal(60), with_images=False))
    assert [name for name, value in scores.items() if value is None] == [
        "kid",
        "kid_std",
        "precision",
        "recall",
    ]
    assert not [name for name in settings if name.startswith(("kid", "prc"))]
    assert notes == ["KID, precision and recall: not computed, some.npz holds mu and sigma, no images"]
    scores, _, notes = metrics.compute(measured(normal(50)), None)
    assert [name for name, value in scores.items() if value is not None] == [
        "inception_score",
        "inception_score_std",
    ]
    assert notes == ["FID, KID, precision and recall: not computed, there is no reference"]


def test_table_has_the_papers_columns_and_marks_the_best():
    scores = {
        "fid": 2.715, "inception_score": 87.94, "inception_score_std": 1.2, "kid": 0.0015, "kid_std": 0.0001,
        "precision": 0.77, "recall": None,
    }  # fmt: skip
    lines = metrics.table([("one", {**scores, "fid": 3.0}), ("two", scores)], best=1).splitlines()
    assert [part.strip() for part in lines[0].split("  ") if part] == [
        "FID ↓",
        "IS ↑",
        "KID x1000 ↓",
        "Precision ↑",
        "Recall ↑",
    ]
    assert lines[2].split() == ["*", "two", "2.71", "87.94", "±", "1.20", "1.500", "±", "0.100", "0.770", "-"]
    assert lines[1].startswith("one ")


def test_a_score_that_is_no_number_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.write({"scores": {"fid": float("nan")}}, tmp_path / "metrics.json", tmp_path / "tb")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_tensorboard_cannot_write_is_one_line(tmp_path):
    (tmp_path / "tb").write_text("a file")
    with pytest.raises(UserError, match=r"metrics\.json: the scores could not be written \("):
        metrics.write({"scores": {"fid": 1.0}}, tmp_path / "metrics.json", tmp_path / "tb")


def test_scores_and_settings_are_written_for_people_and_for_tensorboard(tmp_path):
    scores, settings, notes = metrics.compute(measured(normal(50)), None)
    metrics.write(
        {"scores": scores, "notes": notes, "score_settings": settings},
        tmp_path / "metrics.json",
        tmp_path / "tb",
        7,
    )
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["scores"] == scores
    assert written["score_settings"]["isc_splits"] == 10
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert events.Tags()["scalars"] == ["score/inception_score", "score/inception_score_std"]
    (event,) = events.Scalars("score/inception_score")
    assert (event.step, event.value) == (7, pytest.approx(scores["inception_score"]))
    assert (
        "isc_splits" in events.Tensors("score/settings/text_summary")[0].tensor_proto.string_val[0].decode()
    )
