# Four processes with three timers each that go off once, and are set again only when they have gone off: what loses one
# signal stops one of them for ever. Each process says five times a second how often each has gone off, how often one did
# while it was still running (a signal too many), and which other signals have arrived.
import ctypes
import os
import signal
import time

# Some run out while CRIU writes their process down, and not before it has begun to.
PERIODS = (0.3, 0.45, 0.65, 0.9)
VALUE = 0x5EED_1234_ABCD
# glibc's numbers and structures.
CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGEV_THREAD = 1, 0, 2
REAL_TIME, TOLD = signal.SIGRTMIN + 2, (signal.SIGUSR1, signal.SIGRTMIN + 16)

libc = ctypes.CDLL(None)
function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Event(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", function),
        ("attributes", ctypes.c_void_p),
        ("unused", ctypes.c_char * 32),
    ]


class Spec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval", "interval_ns", "value", "value_ns")]


def timer(**event):
    made = ctypes.c_void_p()
    event = Event(value=VALUE, **event)
    assert libc.timer_create(CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(made)) == 0
    return made


def arm(timer):
    assert libc.timer_settime(timer, 0, ctypes.byref(Spec(value_ns=int(PERIOD * 1e9))), None) == 0


def left(timer):
    spec = Spec()
    assert libc.timer_gettime(timer, ctypes.byref(spec)) == 0
    return spec.value + spec.value_ns


alarms = queued = threads = early = 0
told = []


def on_alarm(*_):
    global alarms, early
    alarms += 1
    early += signal.getitimer(signal.ITIMER_REAL)[0] > 0
    signal.setitimer(signal.ITIMER_REAL, PERIOD)


def on_queued(*_):
    global queued, early
    queued += 1
    early += left(by_signal) > 0
    arm(by_signal)


@function
def on_thread(value):
    global threads, early
    if value == VALUE:
        threads += 1
        early += left(by_thread) > 0
        arm(by_thread)


process = next((n for n in range(1, len(PERIODS)) if os.fork() == 0), 0)
PERIOD = PERIODS[process]
signal.signal(signal.SIGALRM, on_alarm)
signal.signal(REAL_TIME, on_queued)
for number in TOLD:
    signal.signal(number, lambda number, _: told.append(str(int(number))))
by_signal = timer(signo=REAL_TIME, notify=SIGEV_SIGNAL)
by_thread = timer(notify=SIGEV_THREAD, function=on_thread)
signal.setitimer(signal.ITIMER_REAL, PERIOD)
arm(by_signal)
arm(by_thread)
while True:
    counts = f"alarms={alarms} queued={queued} threads={threads} early={early}"
    print(f"process={process} {counts} told={','.join(told)}", flush=True)
    time.sleep(0.2)
