# What is installed beside the library: its headers, and the package that find_package(peer) finds. The prefix is the directory of the Python
# package, wherever that is: the CMake package holds no absolute path.

include(CMakePackageConfigHelpers)

configure_file(csrc/include/peer/version.h.in generated/peer/version.h @ONLY)
configure_file(cmake/peerConfig.cmake.in generated/peerConfig.cmake @ONLY)
write_basic_package_version_file(generated/peerConfigVersion.cmake VERSION ${peer_VERSION} COMPATIBILITY SameMinorVersion)

install(TARGETS peer LIBRARY DESTINATION lib)
install(
  DIRECTORY csrc/include/peer "${CMAKE_CURRENT_BINARY_DIR}/generated/peer"
  DESTINATION include
  FILES_MATCHING
  PATTERN "*.h")
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/generated/peerConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/generated/peerConfigVersion.cmake"
        DESTINATION share/cmake/peer)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/generated/_build_info.json" DESTINATION .)
