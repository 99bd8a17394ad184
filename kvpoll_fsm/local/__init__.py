"""The control socket: how a person on the same machine talks to a running endpoint.

`local.words` has what is said, `local.places` where the sockets are, `local.server.ControlSocket` is the endpoint's end
in the driver's loop, `local.client` the other one.
"""
