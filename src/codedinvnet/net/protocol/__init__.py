"""The Open Inference Protocol V2: requests, responses and metadata, without PyTorch or sockets.

`messages` has what a client and a server say to each other. `http` reads and writes it as JSON with
binary tensors behind it, `grpc` as protobuf messages. `tensors` converts numpy's arrays.
"""
