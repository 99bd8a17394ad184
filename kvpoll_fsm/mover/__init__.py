"""The mover: an endpoint's driver and transports in a process of their own, beside a busy engine.

    host                                                mover (`python -m kvpoll_fsm.mover`)
    Endpoint, handles                                   Driver, core, transports
      client.ProcessEngine  -- frames.Command -->         desk.Desk
                            <-- frames.Event  --
      views.HostView  <-- status.StatusTable (one byte per room) --  views.MoverView
      arenas (memfd)  <-------------- mapped by both ------------->  arenas

Nothing waits for the other side: what a socket does not take is kept and sent later, and `poll()` reads shared
memory. The mover ends with its host, however that ends; a host outlives its mover: rooms fail with `MoverLost`, and
a new mover begins with fresh arenas and another incarnation.
"""
