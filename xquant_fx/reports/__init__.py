"""What people are told: explain, memory_report, measures of quality."""
