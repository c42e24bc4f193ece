"""HTTP to servers that answer in JSON: one client, its event loop, and how patiently it asks again."""
