"""The service as a Ray Serve ingress; its workers are the actors of the Ray pool.

pip install -e '.[models,ray]' 'ray[serve]'  # in the repository's root
serve run examples.ray_serve:app source=mnist k=10 deadline_ms=2000

One replica: a coding group needs its queries in one place. Changes of the policy, and `demo=true`,
need a `token_file`: whoever reaches Ray Serve's port may ask.
"""

from typing import Any

from ray import serve

from codedinvnet import UserError
from codedinvnet.cli.options import from_text
from codedinvnet.net.admin_client import read_token
from codedinvnet.net.collector import freeze_loaded
from codedinvnet.net.listening import log_to_stderr
from codedinvnet.serving.app import NOISY, open_app, warn_open
from codedinvnet.serving.checks import check
from codedinvnet.serving.config import ServeOptions


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the application from `serve run`'s arguments: the source, and options of `serve`."""
    given = {"source": "mnist", "pool": "ray", "host": "0.0.0.0", **arguments}
    options = from_text(ServeOptions, {name: str(value) for name, value in given.items()})
    check(options)
    if unused := {"host", "port"} & arguments.keys():
        raise UserError(f"{unused.pop()}: Ray Serve listens; say it there (http_options)")
    if unused := {"grpc_port", "traces"} & arguments.keys():
        raise UserError(f"{unused.pop()}: it is nothing that this example passes on to Ray Serve")
    if options.demo and options.token_file is None:
        raise UserError("demo: needs token_file, or whoever reaches the port could stop workers")
    read_token(options.token_file)  # or it is refused now

    def make() -> Any:  # in the replica's process
        log_to_stderr(*NOISY)
        warn_open(options)
        made = open_app(options).http()
        freeze_loaded()
        return made

    # The front end computes little; a whole CPU would be taken from the workers.
    deployment = serve.deployment(
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1}
    )
    return deployment(serve.ingress(make)(type("Ingress", (), {}))).bind()
