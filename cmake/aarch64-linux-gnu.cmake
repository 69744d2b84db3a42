# Cross compilation to 64-bit ARM with Debian's g++-aarch64-linux-gnu; qemu-aarch64, if there, runs the result.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

find_program(PYMETA_QEMU NAMES qemu-aarch64 qemu-aarch64-static)
if(PYMETA_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${PYMETA_QEMU}")
endif()

set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
