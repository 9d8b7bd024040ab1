// Whether this process was forked from one that had loaded the extension.
#pragma once

namespace tritonkern {

// Set by module.cpp in a forked child. Its OpenMP runtime would wait forever for threads that exist only in the parent, so that
// calls there run on one thread.
inline volatile bool forked = false;

}  // namespace tritonkern
