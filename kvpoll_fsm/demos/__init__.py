"""The parts of `kvpoll demo`: one sender process, one receiver process per rank, and the one that watches.

- `plan`: what is asked for, checked, and how large pools are made for it;
- `data`: what is sent, made from a seed, and its SHA-256;
- `lines`: the JSON lines the processes talk in;
- `rooms`: what a sender and a receiver process do (`kvpoll_fsm.demo_worker` is their entry);
- `crew`: starts these processes and always ends them;
- `report`: what they said, compared;
- `screen`: the same for people, with rich.
"""
