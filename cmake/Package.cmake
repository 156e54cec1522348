# Installs the library, its headers and the CMake package for find_package(peer). The prefix is the directory of the Python package. The CMake
# package contains no absolute path, so that directory can move.

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
