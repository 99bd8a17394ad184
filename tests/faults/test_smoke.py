from tests.faults.harness import *
from tests.faults.harness import Cluster, BIG, FAST
from tests.faults.proxy import Proxy

def test_smoke(cluster: Cluster, proxy: Proxy) -> None:
    tx, = cluster.open("tx", **BIG, deadlines=FAST)
    rx, = cluster.open("rx", **BIG, deadlines=FAST, tcp={"advertise": f"127.0.0.1:{proxy.port}"})
    proxy.target = rx.data_port
    base = tx("counts"), rx("counts")
    tx("sender", room=1, tokens=2000)
    rx("receiver", room=1, peer=tx.address, tokens=1024)
    assert rx("data", room=1, tokens=2000)
    print(rx("state", side="receiver", room=1), tx.end_of("sender", 1))
    tx("clear"); rx("clear")
    print(base, tx.complaints())
    rx("close")
    assert tx("until_counts", wanted=base[0]) == {}
