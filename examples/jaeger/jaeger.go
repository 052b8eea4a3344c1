//go:build never

// Package jaeger makes Jaeger's command a dependency of this module. It is never compiled itself.
package jaeger

import _ "github.com/jaegertracing/jaeger/cmd/jaeger"
