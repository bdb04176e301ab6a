"""docs/options.md is what the models say."""

import subprocess
import sys

from scripts import options_doc
from tokenflow.editing.techniques import load_technique


def test_the_page_of_options_is_current():
    page = options_doc.PATH.read_text(encoding="utf-8")
    assert page == options_doc.render(), "run: python -m scripts.options_doc"


def test_every_option_and_key_is_explained():
    configs = [load_technique(name).config for name in options_doc.TECHNIQUES]
    models = (options_doc.PreprocessOptions, *configs)
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert f"`{name}`" in options_doc.render() or f"`--{name}`" in options_doc.render()


def test_options_are_read_without_the_libraries_of_models():
    """So that --help and the check of a list of clips do not wait for them."""
    code = (
        "import sys, tokenflow.cache.options, tokenflow.editing.config\n"
        "sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=options_doc.PATH.parents[1]).returncode
        == 0
    )
