"""kvpoll-fsm: the status of a transfer as an explicit state machine, with pluggable transports."""
