"""`TritonOptions`: what `TritonInference` takes, among the options of a pipeline."""

from difflib import get_close_matches
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError
from beam_triton.flags import ALL_FLAGS, Spelling, with_values

_FLAGS = Spelling({name: f"--triton_{name}" for name in ALL_FLAGS})


class TritonOptions(PipelineOptions):
    """Beam's pipeline options ``--triton_endpoint``, ``--triton_model``, ``--triton_pool_max_total``, ….

    ::

        options = PipelineOptions()
        with beam.Pipeline(options=options) as p:
            scored = images | TritonInference(**options.view_as(TritonOptions).triton_arguments())

    There is one for each option of `InferenceOptions`, and one for each field of its policies, named after
    both: ``pool.max_total`` is ``--triton_pool_max_total``. One that is not given has its usual default.
    Names are given with commas (``--triton_outputs=a,b``), mappings as JSON, secrets as ``env:NAME`` or
    ``file:PATH``, and ``none`` stands for None.

    They are read when the pipeline is built, that of a Dataflow template included.
    """

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        group = parser.add_argument_group("Triton")
        group.add_argument("--triton_model", metavar="NAME", help="the model")
        _FLAGS.add_to(group)

    def triton_arguments(self, **defaults: Any) -> dict[str, Any]:
        """The keyword arguments of `TritonInference`, `TritonBatchInference` or `TritonModelHandler`.

        Args:
            defaults: keyword arguments for what the pipeline's options do not say.

        Raises:
            ConfigurationError: there is no endpoint or model, a text makes no value, or an option
                ``--triton_…`` of the command line is unknown, which Beam would leave out.
        """
        self._refuse_unknown()
        arguments = with_values(defaults, _FLAGS.values(self))
        if self.triton_model is not None:
            arguments["model_name"] = self.triton_model
        for name, option in (("endpoint", "--triton_endpoint"), ("model_name", "--triton_model")):
            if name not in arguments:
                raise ConfigurationError(f"{option} is needed")
        for url in self.triton_endpoint or ():
            if redact_url(url) != url:
                raise ConfigurationError(
                    f"--triton_endpoint {redact_url(url)} holds a password or a query, which the job's page "
                    f"would show: give a secret by reference, such as --triton_auth_token=env:NAME"
                )
        return arguments

    def _refuse_unknown(self) -> None:
        known = self.get_all_options()
        for name in self.get_all_options(retain_unknown_options=True):
            if name.startswith("triton_") and name not in known:
                close = get_close_matches(name, [each for each in known if each.startswith("triton_")], n=1)
                hint = f" (did you mean --{close[0]}?)" if close else ""
                raise ConfigurationError(f"there is no option --{name}{hint}")
