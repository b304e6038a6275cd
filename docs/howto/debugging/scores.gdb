set pagination off
set breakpoint pending on
# Threads that come and go are told of in the midst of what the program prints.
set print thread-events off
# After the mask, before the softmax, in one thread of 128: warp 1, lane 5.
break online_softmax if emulator::current->thread_index == 37
run
backtrace 3
up
print *emulator::current
print s_frag[1]
print s_frag[4]
continue
