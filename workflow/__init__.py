import time

# Before any other code of this package was read: an edit after it may be in one module and not in the next.
BEGAN = time.time()
