def unavailable(device_type):
    return "not written yet"
