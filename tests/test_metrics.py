"""The TAP-Vid metrics against cases worked out by hand, a slow loop over the definition, and their own symmetries."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonkern.tracking.metrics import THRESHOLDS, mean_metrics, tapvid_metrics

V, H = False, True  # visible, hidden


def track_along_x(*errors):
    """[1, T, 2] positions on the x axis."""
    return np.array([[[error, 0.0] for error in errors]])


# One point that never moves, five frames, asked at frame 1.
#   frame               0      1      2      3      4
#   truth               vis    query  vis    occ    vis
#   predicted           vis    vis    vis    vis    occ
#   error in px         20     0      3      0.5    1.5
QUERY = np.array([1])
TRUTH = np.array([[V, V, V, H, V]])
PREDICTED = np.array([[V, V, V, V, H]])
STILL = np.zeros((1, 5, 2))
ERRORS = track_along_x(20.0, 0.0, 3.0, 0.5, 1.5)


def test_first_by_hand():
    # Evaluated frames 2, 3, 4; visible in truth: 2 and 4.
    # delta: x=1 none of 2; x=2 frame 4; x=4, 8, 16 frames 2 and 4.           0, 50, 100, 100, 100 -> 70
    # jaccard, tp: visible in truth and prediction and within: frame 2 from x=4 on.
    #   fp: predicted visible (2, 3) and hidden in truth or too far: 3 always, 2 for x=1, 2.
    #   tp / (2 + fp):  0/4, 0/4, 1/3, 1/3, 1/3                                -> 100 * (1/3 * 3) / 5 = 20
    # OA: frame 2 agrees, 3 and 4 do not: 1/3.
    scores = tapvid_metrics(QUERY, TRUTH, STILL, PREDICTED, ERRORS, "first")
    assert [scores[f"delta_{x}"] for x in THRESHOLDS] == [0, 50, 100, 100, 100]
    assert [scores[f"jaccard_{x}"] for x in THRESHOLDS] == pytest.approx([0, 0, 100 / 3, 100 / 3, 100 / 3])
    assert scores["delta_avg"] == pytest.approx(70)
    assert scores["AJ"] == pytest.approx(20)
    assert scores["OA"] == pytest.approx(100 / 3)


def test_strided_by_hand():
    # Frame 0 is evaluated too: visible in both, 20 px off, so it is never within and always a false positive.
    # delta: of 3 visible frames 0, 1, 2, 2, 2.                                (0 + 1 + 2 + 2 + 2) / 15 -> 700/15
    # jaccard: tp / (3 + fp) with fp one more than before: 0/6, 0/6, 1/5, 1/5, 1/5 -> 100 * 0.6 / 5 = 12
    # OA: frames 0 and 2 of 4.
    scores = tapvid_metrics(QUERY, TRUTH, STILL, PREDICTED, ERRORS, "strided")
    assert scores["delta_avg"] == pytest.approx(700 / 15)
    assert scores["AJ"] == pytest.approx(12)
    assert scores["OA"] == pytest.approx(50)


def test_thresholds_are_strict():
    # Exactly 1, 2, 4, 8, 16 px off is outside that threshold: each frame is within the larger ones only.
    points = track_along_x(0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
    seen = np.zeros((1, 6), dtype=bool)
    scores = tapvid_metrics(np.array([0]), seen, np.zeros((1, 6, 2)), seen, points, "first")
    assert [scores[f"delta_{x}"] for x in THRESHOLDS] == [0, 20, 40, 60, 80]


def test_points_are_pooled_over_the_video_not_averaged_over_tracks():
    # Track 0: 1 visible evaluated frame, right. Track 1: 3, all wrong. Pooled 1/4, averaged over tracks 1/2.
    truth = np.array([[V, V, H, H], [V, V, V, V]])
    points = np.zeros((2, 4, 2))
    answer = points.copy()
    answer[1, 1:] = 100
    scores = tapvid_metrics(np.array([0, 0]), truth, points, truth, answer, "first")
    assert scores["delta_avg"] == pytest.approx(25)


def test_nothing_visible_to_evaluate():
    # Frame 1 alone is evaluated and hidden. delta is 0/0; AJ is 0/0 if nothing is predicted visible, else 0/1.
    truth, still = np.array([[V, H]]), np.zeros((1, 2, 2))
    hidden = tapvid_metrics(np.array([0]), truth, still, np.array([[V, H]]), still, "first")
    assert math.isnan(hidden["delta_avg"]) and math.isnan(hidden["AJ"]) and hidden["OA"] == 100
    shown = tapvid_metrics(np.array([0]), truth, still, np.array([[V, V]]), still, "first")
    assert math.isnan(shown["delta_avg"]) and shown["AJ"] == 0 and shown["OA"] == 0


@pytest.mark.parametrize("tracks, frames", [(0, 4), (2, 1)])
def test_nothing_to_evaluate_is_nan(tracks, frames):
    seen, points = np.zeros((tracks, frames), dtype=bool), np.zeros((tracks, frames, 2))
    scores = tapvid_metrics(np.zeros(tracks), seen, points, seen, points, "strided")
    assert all(math.isnan(value) for value in scores.values())


def test_a_nan_prediction_is_wrong_and_a_nan_truth_under_occlusion_is_not_read():
    truth = np.array([[V, V, H]])
    points = track_along_x(0.0, 0.0, math.nan)
    right = tapvid_metrics(np.array([0]), truth, points, truth, track_along_x(0.0, 0.0, 0.0), "first")
    assert right["delta_avg"] == right["AJ"] == right["OA"] == 100
    wrong = tapvid_metrics(np.array([0]), truth, points, truth, track_along_x(0.0, math.nan, 0.0), "first")
    assert wrong["delta_avg"] == wrong["AJ"] == 0 and wrong["OA"] == 100


def test_dataset_mean_weighs_videos_equally_and_skips_nan():
    rows = [{"AJ": 10.0, "OA": math.nan}, {"AJ": 20.0, "OA": math.nan}, {"AJ": math.nan, "OA": math.nan}]
    mean = mean_metrics(rows)
    assert mean["AJ"] == 15 and math.isnan(mean["OA"])
    with pytest.raises(ValueError, match="nothing to average"):
        mean_metrics([])


def random_video(rng, tracks, frames):
    """Arguments of `tapvid_metrics` with errors on the scale of the thresholds; positions on a grid of 1/2 px."""
    points = rng.integers(0, 512, (tracks, frames, 2)) / 2
    errors = rng.integers(-8, 9, (tracks, frames, 2)) * rng.choice([0.5, 1.0, 2.0], (tracks, frames, 1))
    return (
        rng.integers(0, frames, tracks),
        rng.random((tracks, frames)) < 0.4,
        points,
        rng.random((tracks, frames)) < 0.4,
        points + errors,
    )


def by_definition(query_frames, occluded, points, predicted_occluded, predicted_points, mode):
    """delta_avg, AJ, OA counted one point, one frame and one threshold at a time: tp, fp, fn as in the paper."""
    within_fractions, jaccards = [], []
    for threshold in (1.0, 2.0, 4.0, 8.0, 16.0):
        visible = near = tp = fp = fn = agree = total = 0
        for n, query_frame in enumerate(query_frames):
            for t in range(occluded.shape[1]):
                if t == query_frame or (mode == "first" and t < query_frame):
                    continue
                total += 1
                distance = math.hypot(*(predicted_points[n, t] - points[n, t]))
                truth, answer, close = not occluded[n, t], not predicted_occluded[n, t], distance < threshold
                agree += truth == answer
                visible += truth
                near += truth and close
                tp += truth and answer and close
                fn += truth and not (answer and close)
                fp += answer and not (truth and close)
        within_fractions.append(near / visible if visible else math.nan)
        jaccards.append(tp / (tp + fn + fp) if tp + fn + fp else math.nan)
    return 20 * sum(within_fractions), 20 * sum(jaccards), 100 * agree / total if total else math.nan


cases = given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 9), st.sampled_from(["first", "strided"]))


@settings(deadline=None)
@cases
def test_matches_the_definition(seed, tracks, frames, mode):
    video = random_video(np.random.default_rng(seed), tracks, frames)
    scores = tapvid_metrics(*video, mode)
    expected = by_definition(*video, mode)
    assert [scores[name] for name in ("delta_avg", "AJ", "OA")] == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(deadline=None)
@cases
def test_perfect_predictions_score_100_and_nothing_scores_more(seed, tracks, frames, mode):
    video = query_frames, occluded, points, *_ = random_video(np.random.default_rng(seed), tracks, frames)
    for name, best in tapvid_metrics(query_frames, occluded, points, occluded, points, mode).items():
        assert best == 100 or math.isnan(best), name
    for name, value in tapvid_metrics(*video, mode).items():
        assert 0 <= value <= 100 or math.isnan(value), name


@settings(deadline=None)
@cases
def test_order_of_points_does_not_matter(seed, tracks, frames, mode):
    rng = np.random.default_rng(seed)
    video = random_video(rng, tracks, frames)
    order = rng.permutation(tracks)
    shuffled = tapvid_metrics(*(array[order] for array in video), mode)
    assert shuffled == pytest.approx(tapvid_metrics(*video, mode), nan_ok=True)


def test_query_frames_are_rounded():
    assert tapvid_metrics(np.array([1.2]), TRUTH, STILL, PREDICTED, ERRORS, "first") == tapvid_metrics(
        QUERY, TRUTH, STILL, PREDICTED, ERRORS, "first"
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"mode": "last"}, ValueError, "mode must be"),
        ({"query_frames": np.array([5])}, ValueError, r"query_frames must lie in 0\.\.4"),
        ({"query_frames": np.array([-1])}, ValueError, r"query_frames must lie in 0\.\.4"),
        ({"query_frames": np.array([1, 1])}, ValueError, r"query_frames must have shape \[1\]"),
        ({"occluded": TRUTH[0]}, ValueError, r"occluded must have shape \[N, T\]"),
        ({"points": STILL[:, :3]}, ValueError, r"points must have shape \[1, 5, 2\]"),
        ({"predicted_points": STILL[..., 0]}, ValueError, r"predicted_points must have shape \[1, 5, 2\]"),
        ({"predicted_occluded": PREDICTED[:, :3]}, ValueError, r"predicted_occluded must have shape \[1, 5\]"),
        ({"occluded": TRUTH.astype(float)}, TypeError, "occluded must be bool"),
        ({"predicted_occluded": PREDICTED.astype(int)}, TypeError, "predicted_occluded must be bool"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "query_frames": QUERY,
        "occluded": TRUTH,
        "points": STILL,
        "predicted_occluded": PREDICTED,
        "predicted_points": ERRORS,
        "mode": "first",
    }
    with pytest.raises(error, match=message):
        tapvid_metrics(**(arguments | change))
