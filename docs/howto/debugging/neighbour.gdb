set pagination off
set breakpoint pending on
directory docs/howto/debugging
# Where every objection of the emulator goes through: the libraries are loaded later, so it is pending.
break emulator::fail
run
backtrace 6
frame 4
list
