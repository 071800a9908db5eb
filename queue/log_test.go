package queue_test

import "go.uber.org/zap"

type zapLogger = zap.Logger

const levelError = zap.ErrorLevel
