"""The service as a Ray Serve ingress; its workers are the actors of the Ray pool.

pip install '.[ray]' 'ray[serve]'    # in the repository's root
serve run examples.ray_serve:app source=mnist k=10 deadline_ms=2000

One replica: a coding group needs its queries in one place.
"""

import dataclasses
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray import serve

from codedinvnet import UserError
from codedinvnet.asking import read_token
from codedinvnet.collector import freeze_loaded
from codedinvnet.config import meant
from codedinvnet.serving.faces.http import build_app
from codedinvnet.serving.listening import log_to_stderr
from codedinvnet.serving.options import ServeOptions, check
from codedinvnet.serving.serve import app_options, make_service


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application from `serve run`'s arguments: the source, and options of `serve`."""
    names = [field.name for field in dataclasses.fields(ServeOptions)]
    for name in arguments:
        if name not in names:
            raise UserError(f"{name}: no option of serve: {meant(name, names)}")
    settings = {"source": "mnist", "k": 10, "pool": "ray", **arguments}
    if isinstance(hosts := settings.get("allowed_host"), str):
        settings["allowed_host"] = hosts.split(",")
    try:
        options = TypeAdapter(ServeOptions).validate_python(settings)  # they come as text
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(f"{fault['loc'][0]}: {fault['msg']}, got {fault['input']!r}") from error
    check(options)
    if unused := {"host", "port"} & arguments.keys():
        raise UserError(f"{unused.pop()}: Ray Serve listens; say it there (http_options)")
    read_token(options.token_file)  # or it is refused now

    def make() -> Any:  # in the replica's process
        log_to_stderr()
        service = make_service(options)
        made = build_app(service, app_options(options, service.served))
        freeze_loaded()
        return made

    # The front end computes little; a whole CPU would be taken from the workers.
    deployment = serve.deployment(
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1}
    )
    return deployment(serve.ingress(make)(type("Ingress", (), {}))).bind()
