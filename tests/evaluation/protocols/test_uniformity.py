from smalti.evaluation.config import EvalConfig
from smalti.evaluation.protocols.uniformity import uniformity


def test_equal_vectors_have_uniformity_zero(constant, photos, features_of):
    scores = uniformity(features_of(constant, photos, "images"), EvalConfig())
    assert abs(scores.metrics["uniformity"]) < 1e-6
