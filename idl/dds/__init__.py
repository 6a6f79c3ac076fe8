"""The DDS wire: types, topic table with QoS, domain configuration, the bus (one WaitSet thread).

It lives beside the contracts because both ends of every control topic, which may not import each
other, need exactly the same of it (ADR 0004).
"""
