"""Making pictures with a model, judging them, and storing pairs for distillation."""


def __getattr__(name: str):
    if name == "MaskedFluxPipeline":  # on demand: diffusers' pipelines take seconds to import
        from dedistill.families.flux_pipeline import MaskedFluxPipeline

        return MaskedFluxPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
