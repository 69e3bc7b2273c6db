"""Serving: rules decide, workers compute, the service joins them, and faces speak to clients.

A query's way, module by module:

1. `faces` read a request (`bodies`, `tensors`), and check it against the model (`served`).
2. `service` makes queries of it, one for each row, and joins their answers.
3. `frontend` takes its queries if there is room, and keeps them until each has ended (`waiting`).
4. `rules` decide what is done. They are asked again at every event, and when `alarm` calls.
5. `workers` compute the tasks that `calling` gives them, and it tells the rules what became of
   them. `supervisor` starts lost workers again.
6. `decoding` makes answers of outputs, by a code in `decoder`. `outputs` says which will do.
7. `reliance` releases approximate answers, or holds them back, and finds wrong workers.

`serve` starts all this: `options` refuses what cannot work, `opening` loads the model and makes the
pool, `choices` lists the policies it can change to, and `listening` opens the port. `metrics`,
`times`, `recent`, `tracing` and `views` record what happens. In a `gateway` the pool of workers is
the upstreams, and requests may pass through it as they are.
"""
