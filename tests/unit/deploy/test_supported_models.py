"""The page of models is what the code and the installed transformers know."""

import json

import pytest
import transformers

from deploy import supported_models
from quartet.runtime.model_files.servable import causal_models
from quartet.runtime.model_files.towers import TOWERS
from quartet.scheduler_service.model import embedders, registry
from quartet.scheduler_service.model.fused_backend import can_fuse

AGAIN = "run `python -m tests.model.try_architectures`, then `python -m deploy.supported_models --write`"
TYPES = {architecture: model_type for model_type, architecture in causal_models().items()}


def test_the_page_is_what_the_command_writes():
    assert supported_models.PAGE.read_text() == supported_models.page(), AGAIN


def test_what_was_tried_is_of_the_installed_transformers():
    tried = json.loads(supported_models.TRIED.read_text())
    if tried["transformers"] != transformers.__version__:
        pytest.skip(f"transformers {transformers.__version__} is not the one that Quartet is tested with")
    assert set(causal_models().values()) <= {*registry.FAMILIES, *TOWERS, *tried["outcomes"]}, AGAIN


def test_every_family_has_models_that_a_reader_knows():
    assert supported_models.MODELS.keys() == {*registry.FAMILIES, *embedders.FAMILIES}
    assert supported_models.TOWER_MODELS.keys() == TOWERS.keys()


@pytest.mark.parametrize("name", registry.FAMILIES)
def test_the_page_says_which_families_have_fused_operations(name):
    config = transformers.CONFIG_MAPPING[TYPES[name]]().to_dict()
    if TYPES[name] == "lfm2":  # transformers' own default has no convolution, released models have
        config["layer_types"] = ["conv", *config["layer_types"][1:]]
    assert can_fuse(registry.FAMILIES[name](config, 2048)) == (supported_models.on_gpu(name) == "fused")
