"""The service as a Ray Serve ingress; its workers are the actors of the Ray pool.

pip install -e '.[models,ray]' 'ray[serve]'  # in the repository's root
serve run examples.ray_serve:app source=mnist k=10 deadline_ms=2000

One replica: a coding group needs its queries in one place. Changes of the policy, and `demo=true`,
need a `token_file`: whoever reaches Ray Serve's port may ask.
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
from codedinvnet.serving.options import ServeOptions, check, tell_open
from codedinvnet.serving.serve import app_options, make_service


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application from `serve run`'s arguments: the source, and options of `serve`."""
    names = [field.name for field in dataclasses.fields(ServeOptions)]
    for name in arguments:
        if name not in names:
            raise UserError(f"{name}: no option of serve: {meant(name, names)}")
    settings = {"source": "mnist", "pool": "ray", **arguments}
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
    if unused := {"grpc_port", "traces"} & arguments.keys():
        raise UserError(f"{unused.pop()}: it is nothing that this example passes on to Ray Serve")
    if options.demo and options.token_file is None:
        raise UserError("demo: needs token_file, or whoever reaches the port could stop workers")
    read_token(options.token_file)  # or it is refused now

    def make() -> Any:  # in the replica's process
        log_to_stderr()
        guarded = options.token_file is not None  # who reaches Ray Serve's port, it alone knows
        if not guarded:
            tell_open("Ray Serve's")
        service = make_service(options)
        how = dataclasses.replace(app_options(options, service.served), guarded=guarded)
        made = build_app(service, how)
        freeze_loaded()
        return made

    # The front end computes little; a whole CPU would be taken from the workers.
    deployment = serve.deployment(
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1}
    )
    return deployment(serve.ingress(make)(type("Ingress", (), {}))).bind()
