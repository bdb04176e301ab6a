"""docs/options.md is what the models say."""

from scripts import options_doc


def test_the_page_of_options_is_current():
    page = options_doc.PATH.read_text(encoding="utf-8")
    assert page == options_doc.render(), "run: python -m scripts.options_doc"


def test_every_option_and_key_is_explained():
    models = (options_doc.PreprocessOptions, *options_doc.TECHNIQUES.values())
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert f"`{name}`" in options_doc.render() or f"`--{name}`" in options_doc.render()
